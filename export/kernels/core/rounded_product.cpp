// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// Products of windows in eight bits. Rows are rounded once, not as often as windows overlap; four inputs of a row are a
// unit of 32 bits, which meets four rows of the matrix in every lane.
#include "integers.h"
#include "window_tiles.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

// A unit of the matrix, four signed bytes a lane, and the four rounded inputs that it meets: bytes where a processor sums
// products of bytes, halves where of halves (the first and third input, then the others), elsewhere floats.
struct Unit {
  static constexpr int kMet = kByteProducts ? 1 : kIntegerProducts ? 2 : 4;
  static Vec add(Vec sum, Vec weights, const float* x) {
    const Integers w = (Integers)weights;
    const auto all = [x](int i) { return (Integers)(IntVec{} + bits_of(x + i)); };
    if constexpr (kByteProducts) return (Vec)add_bytes((Integers)sum, all(0), w);
    if constexpr (kIntegerProducts)
      return (Vec)add_halves(add_halves((Integers)sum, even_bytes(w), all(0)), odd_bytes(w), all(1));
    for (int i = 0; i < 4; ++i) sum += to_floats(w << (24 - 8 * i) >> 24) * x[i];
    return sum;
  }
};

}  // namespace

template <>
struct Sums<Unit> {
  static Vec begin(const EdgesepWindows& s, int64_t at, int64_t count) {
    if (!s.begin) return Vec{};
    const Integers begin = load_as<Integers>(s.begin + at, count);
    return kIntegerProducts ? (Vec)begin : to_floats(begin);
  }
  static Vec end(const EdgesepWindows& s, Vec sums, int64_t window, int64_t at, int64_t count) {
    Vec sum = kIntegerProducts ? to_floats((Integers)sums) : sums;
    if (s.steps) sum *= s.steps[window];
    return sum * load(s.scale + at, count) + load(s.bias + at, count);
  }
};

namespace {

// Some inputs, whole units of them. Units lie apart from each other, whatever is in them. `held`: within 0 and 255.
template <bool held>
void round(const float* x, int64_t count, float per_step, float at_zero, float* room) {
  const Vec inverse = splat(per_step), zero = splat(at_zero);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, count - i);
    const Vec y = load(x + i, lanes) * inverse + zero;
    const Integers v = rounded(held ? at_most(at_least(y, 0.0f), 255.0f) : y);
    float* to = room + i / 4 * Unit::kMet;
    if constexpr (!kIntegerProducts) {
      store(to, to_floats(v), lanes);
      continue;
    }
    uint8_t bytes[kLanes];
    uint8_t* taken = kByteProducts && lanes == kLanes ? reinterpret_cast<uint8_t*>(to) : bytes;
    store_bytes(taken, v);
    if (kByteProducts && taken == bytes) std::memcpy(to, bytes, static_cast<size_t>(lanes));
    for (int64_t u = 0; !kByteProducts && u < lanes / 4; ++u) {
      uint64_t unit = bits_of(reinterpret_cast<const float*>(bytes) + u);
      unit = (unit & 0x00ff00ff) | (unit & 0xff00ff00) << 24;
      std::memcpy(to + 2 * u, &unit, sizeof unit);
    }
  }
}

// The step of a row of x. Magnitudes are compared as integers, of which infinity is above all numbers and NaN above it:
// such a step makes everything that follows no number, too.
float step_of(const float* x, int64_t inputs) {
  const auto size = [](Vec v) { return (Integers)float_to_bits(magnitude(v)); };
  const auto larger = [](Integers a, Integers b) { return a > b ? a : b; };
  Integers most{}, other{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= inputs; i += 2 * kLanes) {
    most = larger(most, size(load(x + i, kLanes)));
    other = larger(other, size(load(x + i + kLanes, kLanes)));
  }
  for (; i < inputs; i += kLanes) most = larger(most, size(load(x + i, std::min<int64_t>(kLanes, inputs - i))));
  int32_t lanes[kLanes], found = 0;
  store_as(lanes, larger(most, other), kLanes);
  for (int32_t lane : lanes) found = std::max(found, lane);
  float largest;
  std::memcpy(&largest, &found, sizeof largest);
  return largest / 127;
}

}  // namespace

extern const int sums_bytes;
const int sums_bytes = kByteProducts;

void rounded_rows(const EdgesepWindows* s, int64_t first, int64_t end) {
  const auto room = [s](int64_t row) { return s->room + row * s->inputs / 4 * Unit::kMet; };
  if (!s->steps)
    return round<true>(s->x + first * s->inputs, (end - first) * s->inputs, 1 / s->x_scale,
                       static_cast<float>(s->x_zero), room(first));
  for (int64_t row = first; row < end; ++row) {
    const float* const x = s->x + row * s->apart;
    const float step = s->steps[row] = step_of(x, s->inputs);
    round<false>(x, s->inputs, step > 0 ? 1 / step : 0, 128, room(row));
  }
}

void rounded_product(const EdgesepWindows* s, int64_t first, int64_t end) {
  EdgesepWindows units = *s;
  units.x = s->room;
  units.weight = reinterpret_cast<const float*>(s->bytes);
  units.inputs = s->inputs / 4;
  std::vector<float> nothing(static_cast<size_t>(s->inputs), static_cast<float>(s->x_zero));
  if constexpr (kIntegerProducts) {
    const uint32_t zero = static_cast<uint32_t>(s->x_zero) * (kByteProducts ? 0x01010101u : 0x00010001u);
    for (float& unit : nothing) std::memcpy(&unit, &zero, sizeof zero);
  }
  product<Unit>(&units, nothing.data(), first, end);
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
