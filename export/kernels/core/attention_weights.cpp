// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// The first pass of attention over the past: scores and their softmax. Scores stand with the frames of a call side by
// side in a register, so that no sum runs across lanes and softmax is a loop over registers.
#include <algorithm>
#include <limits>
#include <vector>

#include "attention_rounded.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kRows = kParts == 1 ? 8 : 4;  // past frames at a time, as many as there are registers for
constexpr float kNothing = -50.0f;  // what is hidden weighs nothing, not a denormal number, which processors are slow at

[[maybe_unused]] inline void to_halves(const uint8_t* __restrict from, int64_t count, uint16_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// What scores are sums of products of: floats, or pairs of halves as in vec.h. Both are units of 32 bits.
struct Floats {
  using Sum = Vec;
  static Sum add(Sum sum, Vec query, Vec key) { return sum + query * key; }
};
struct HalfPairs {
  using Sum = Integers;
  static Sum add(Sum sum, Vec query, Vec key) { return add_halves(sum, (Integers)query, (Integers)key); }
};

// A unit, or two of them, over and over.
template <int fold>
inline Vec repeated(const float* p) {
  using Unit = std::conditional_t<fold == 1, int32_t, int64_t>;
  typedef Unit Units __attribute__((vector_size(4 * kLanes)));
  Unit unit;
  std::memcpy(&unit, p, sizeof unit);
  return (Vec)(Units{} + unit);
}

// A group's queries: (count / fold, kGroup) units. Frame n has the lanes from fold n on: a call of few frames fills its
// registers with two units of each.
template <int fold>
struct Queries {
  int64_t count;  // units, a multiple of fold
  std::vector<float> units;
  float begin[kGroup] = {};  // what sums begin with

  explicit Queries(int64_t least)
      : count((least + fold - 1) / fold * fold), units(static_cast<size_t>(count / fold * kGroup)) {}

  float* at(int64_t frame, int64_t unit) {
    return units.data() + unit / fold * kGroup + fold * frame + unit % fold;
  }
};

template <int fold>
Queries<fold> as_floats(const float* q, int64_t count, int64_t size) {
  Queries<fold> made(size);
  for (int64_t n = 0; n < count; ++n)
    for (int64_t d = 0; d < size; ++d) *made.at(n, d) = q[n * size + d];
  return made;
}

// Halves are as large as they can be without a sum of 255 times as much beyond 2**31; back: what a sum counts for.
template <int fold>
Queries<fold> as_halves(const float* q, int64_t count, int64_t size, uint32_t zero, float* back) {
  Queries<fold> made((size + 1) / 2);
  std::vector<uint32_t> halves(static_cast<size_t>(2 * made.count + kLanes));
  for (int64_t n = 0; n < count; ++n, q += size) {
    const auto part = [&](int64_t d) { return load(q + d, std::min<int64_t>(kLanes, size - d)); };
    Vec most = splat(1e-30f), total = most;
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec v = magnitude(part(d));
      most = v > most ? v : most;
      total += v;
    }
    float largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    const float scale = std::min(32767.0f / largest, kFinest / sum(total));
    for (int64_t d = 0; d < size; d += kLanes) store_as(halves.data() + d, rounded(part(d) * scale), kLanes);
    uint32_t begin[fold] = {};  // unsigned: what NaN was rounded to may be anything
    for (int64_t u = 0; u < made.count; ++u) {
      const uint32_t one = halves[static_cast<size_t>(2 * u)], other = halves[static_cast<size_t>(2 * u + 1)];
      const uint32_t unit = (one & 0xffff) | other << 16;
      std::memcpy(made.at(n, u), &unit, sizeof unit);
      begin[u % fold] -= zero * (one + other);
    }
    std::memcpy(made.begin + fold * n, begin, sizeof begin);
    std::fill_n(back + fold * n, fold, 1 / scale);
  }
  return made;
}

// Sums of `rows` keys for some lanes of a group: (rows, kGroup). No more happens here, or they would not stay in
// registers.
template <class Number, int rows, int fold>
inline void score(const float* const* keys, const Queries<fold>& queries, int64_t lanes, float* to) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    typename Number::Sum sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = load_as<typename Number::Sum>(queries.begin + lane, kLanes);
    const float* query = queries.units.data() + lane;
    for (int64_t u = 0; u < queries.count; u += fold, query += kGroup) {
      const Vec q = load(query, kLanes);
      for (int r = 0; r < rows; ++r) sums[r] = Number::add(sums[r], q, repeated<fold>(keys[r] + u));
    }
    for (int r = 0; r < rows; ++r) store_as(to + r * kGroup + lane, sums[r], kLanes);
  }
}

bool all_zero(const float* p, int64_t count) {
  IntVec bits{};
  for (int64_t i = 0; i < count; i += kLanes)
    bits |= float_to_bits(load(p + i, std::min<int64_t>(kLanes, count - i)));
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= bits[i];
  return !any;
}

// What hides frames from those of a group, then exponentials and their sums' inverse, for all rows.
void soften(const EdgesepAttention& s, int64_t first, float* scores) {
  const int64_t rows = s.past + s.frames, count = std::min(kGroup, s.frames - first);
  for (int64_t n = 0; n < count; ++n) {
    const float* hidden = s.hidden + (first + n) * rows;
    // A stream that has run for a while sees all of its past.
    for (int64_t j = all_zero(hidden, s.past) ? s.past : 0; j < rows; ++j) scores[j * kGroup + n] += hidden[j];
  }
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    float* at = scores + lane;
    Vec most = splat(-std::numeric_limits<float>::infinity()), total{};
    for (int64_t j = 0; j < rows; ++j) {
      const Vec v = load(at + j * kGroup, kLanes);
      most = v > most ? v : most;
    }
    for (int64_t j = 0; j < rows; ++j) {
      const Vec below = load(at + j * kGroup, kLanes) - most, v = below < kNothing ? Vec{} : exp(below);
      total += v;
      store(at + j * kGroup, v, kLanes);
    }
    const Vec share = 1.0f / total;
    for (int64_t j = 0; j < rows; ++j) store(at + j * kGroup, load(at + j * kGroup, kLanes) * share, kLanes);
  }
}

// The weights of a group.
template <int fold>
void weigh(const EdgesepAttention& s, int64_t item, int64_t group) {
  const int64_t rows = s.past + s.frames, size = s.keys, count = std::min(kGroup, s.frames - group * kGroup);
  const int64_t row_bytes = size * (s.k_scale == 0 ? int64_t{sizeof(float)} : 1);
  const char* past = static_cast<const char*>(s.past_k) + item * s.past * row_bytes;
  const float *own = s.k + item * s.frames * size, *q = s.q + (item * s.frames + group * kGroup) * size;
  float* scores = s.weights + (item * edgesep_attention_groups(&s) + group) * rows * kGroup;
  const auto put = [&](int64_t j, int64_t lane, Vec sums) {
    float* to = scores + j * kGroup + lane;
    if constexpr (fold == 1) return store(to, sums, kLanes);
    float lanes[kLanes];
    store(lanes, sums, kLanes);
    for (int n = 0; n < kLanes / 2; ++n) to[n] = lanes[2 * n] + lanes[2 * n + 1], to[n + kLanes / 2] = 0;
  };
  // Keys from j to `stop`, which `key` puts into units.
  const auto over = [&](auto number, int64_t j, int64_t stop, const Queries<fold>& queries, auto key, auto value) {
    using Number = decltype(number);
    const auto some = [&](auto many) {
      const float* keys[many];
      for (int r = 0; r < many; ++r) keys[r] = key(j + r, r);
      float sums[many * kGroup];
      score<Number, many, fold>(keys, queries, fold * count, sums);
      for (int r = 0; r < many; ++r)
        for (int64_t lane = 0; lane < fold * count; lane += kLanes)
          put(j + r, lane, value(load_as<typename Number::Sum>(sums + r * kGroup + lane, kLanes), lane));
      j += many;
    };
    while (j + kRows <= stop) {
      if (j + 3 * kRows <= s.past)  // what comes after the next ones
        for (int64_t b = 0; b < kRows * row_bytes; b += 64)
          __builtin_prefetch(past + (j + 2 * kRows) * row_bytes + b, 0, 2);
      some(std::integral_constant<int, kRows>{});
    }
    while (j < stop) some(std::integral_constant<int, 1>{});
  };

  int64_t done = 0;
  if constexpr (kIntegerProducts)
    if (s.k_scale != 0) {
      float back[kGroup] = {};
      const Queries<fold> halves = as_halves<fold>(q, count, size, static_cast<uint32_t>(s.k_zero), back);
      std::vector<uint16_t> room(static_cast<size_t>(kRows * 2 * halves.count));
      const auto key = [&](int64_t j, int r) {
        uint16_t* to = room.data() + r * 2 * halves.count;
        to_halves(reinterpret_cast<const uint8_t*>(past) + j * size, size, to);
        return reinterpret_cast<const float*>(to);
      };
      over(HalfPairs{}, 0, s.past, halves, key, [&](Integers sums, int64_t lane) {
        return to_floats(sums) * s.k_scale * load(back + lane, kLanes);
      });
      done = s.past;
    }
  std::vector<float> room(static_cast<size_t>(kRows * size));
  const auto key = [&](int64_t j, int r) -> const float* {
    if (j >= s.past) return own + (j - s.past) * size;
    if (s.k_scale == 0) return reinterpret_cast<const float*>(past) + j * size;
    float* to = room.data() + r * size;
    widen(reinterpret_cast<const uint8_t*>(past) + j * size, size, s.k_scale, s.k_zero, to);
    return to;
  };
  over(Floats{}, done, rows, as_floats<fold>(q, count, size), key, [](Vec sums, int64_t) { return sums; });
  soften(s, group * kGroup, scores);
}

}  // namespace

void attention_weights(const EdgesepAttention* s, int64_t first, int64_t end) {
  const int64_t groups = edgesep_attention_groups(s);
  for (int64_t item = first; item < end; ++item)
    for (int64_t g = 0; g < groups; ++g) {
      const bool few = 2 * std::min(kGroup, s->frames - g * kGroup) <= kLanes && s->keys % 2 == 0;
      few ? weigh<2>(*s, item, g) : weigh<1>(*s, item, g);
    }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
