// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// A step of a few rows is a small product, which runtimes start, spread over threads and wait for at every step. Here a
// thread takes rows through all steps: the four gates of a register of hidden channels are summed side by side, and what
// becomes of them is computed before they leave the registers.
#include "lstm_steps.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "integers.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kGates = 4, kInput = 0, kOutput = 1, kForget = 2, kCell = 3;
constexpr int64_t kGroup = EDGESEP_LSTM_GROUP;
constexpr int kRows = kLanes == 16 ? 6 : 3;  // with four gates each, as many as stay in registers

// e^-x of what sigmoid and tanh make of x, held where three of them can be multiplied; beyond that both are flat. A rough
// one is far closer than a step of h in bytes.
template <bool kRough>
inline Vec falling(Vec x) {
  return exp2_within<kRough>(at_most(at_least(x * -kLog2E, -36.0f), 36.0f));
}

// h as bytes.
struct Hidden {
  // Of a row, whole registers of them.
  static int64_t size(int64_t hidden) { return (hidden + kGroup - 1) / kGroup * kGroup; }

  static void put([[maybe_unused]] uint8_t* bytes, [[maybe_unused]] Vec h) {
    if constexpr (kIntegerProducts) store_bytes(bytes, rounded(h * kMost) + kMiddle);
  }

  static constexpr float kMost = 127;
  static constexpr int32_t kMiddle = 128;
};

// The matrix in eight bits as products of bytes take it.
struct ByteMatrix {
  int64_t quads;  // hidden inputs, four at a time
  const int8_t* weights;
  std::vector<float> steps;        // scale, times the step of h
  std::vector<int32_t> of_middle;  // what kMiddle in place of every h would make

  explicit ByteMatrix(const EdgesepLstm& s) : quads((s.hidden + 3) / 4), weights(s.bytes) {
    const int64_t groups = (s.hidden + kGroup - 1) / kGroup, wide = kGates * kGroup;
    steps.resize(static_cast<size_t>(groups * wide));
    of_middle.resize(steps.size());
    for (int64_t at = 0; at < groups * wide; at += kLanes) {
      store(steps.data() + at, load(s.scale + at, kLanes) * (1 / Hidden::kMost), kLanes);
      Integers total{};
      for (int64_t q = 0; q < quads; ++q)
        total = add_bytes(total, Integers{} + kMiddles, word(at / wide, q, at % wide));
      store_as(of_middle.data() + at, total, kLanes);
    }
  }

  // Four inputs of a register of channels of a gate: of those of a group from `at` on.
  Integers word(int64_t group, int64_t q, int64_t at) const {
    return load_as<Integers>(weights + 4 * ((group * quads + q) * kGates * kGroup + at), kLanes);
  }

  static constexpr int32_t kMiddles = static_cast<int32_t>(0x80808080u);  // kMiddle, four times
};

// The matrix in eight bits as floats, for processors that do not sum products of bytes.
[[maybe_unused]] std::vector<float> as_floats(const EdgesepLstm& s) {
  const int64_t groups = (s.hidden + kGroup - 1) / kGroup, quads = (s.hidden + 3) / 4, wide = kGates * kGroup;
  std::vector<float> made(static_cast<size_t>(groups * s.hidden * wide));
  for (int64_t row = 0; row < groups * quads; ++row) {
    const int64_t group = row / quads, k = row % quads * 4;
    for (int64_t at = 0; at < wide; at += kLanes) {
      const Integers word = load_as<Integers>(s.bytes + 4 * (row * wide + at), kLanes);
      const Vec scale = load(s.scale + group * wide + at, kLanes);
      for (int64_t i = 0; i < 4 && k + i < s.hidden; ++i) {
        const Integers one = word << static_cast<int>(24 - 8 * i) >> 24;  // a byte, with its sign
        store(made.data() + (group * s.hidden + k + i) * wide + at, to_floats(one) * scale, kLanes);
      }
    }
  }
  return made;
}

// Rows that take the same step.
struct Step {
  const float* recurrent;
  int64_t hidden;
  const float *gates, *before;  // of the first row
  float *cell, *after;
  const ByteMatrix* matrix = nullptr;  // instead of recurrent, with h as bytes
  const uint8_t* bytes_before = nullptr;
  uint8_t* bytes_after = nullptr;

  void skip(int64_t rows) {
    gates += rows * kGates * hidden;
    before += rows * hidden;
    cell += rows * hidden;
    after += rows * hidden;
    if (!matrix) return;
    bytes_before += rows * Hidden::size(hidden);
    bytes_after += rows * Hidden::size(hidden);
  }
};

// What a gate of a row is made of: its projected inputs, then h and the matrix.
template <int rows>
using Sums = Vec[rows][kGates];

template <int rows>
inline void multiply(const Step& s, int64_t channel, int64_t count, Sums<rows>& sums) {
  const int64_t H = s.hidden;
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < kGates; ++g) sums[r][g] = load(s.gates + (r * kGates + g) * H + channel, count);
  const float* weight = s.recurrent + channel / kGroup * H * kGates * kGroup + channel % kGroup;
  for (int64_t k = 0; k < H; ++k, weight += kGates * kGroup) {
    Vec w[kGates];
    for (int g = 0; g < kGates; ++g) w[g] = load(weight + g * kGroup, kLanes);
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < kGates; ++g) sums[r][g] += w[g] * s.before[r * H + k];
  }
}

template <int rows>
inline void multiply_bytes(const Step& s, int64_t channel, int64_t count, Sums<rows>& sums) {
  const ByteMatrix& m = *s.matrix;
  const int64_t size = Hidden::size(s.hidden), group = channel / kGroup, at = group * kGates * kGroup + channel % kGroup;
  const uint8_t* before = s.bytes_before;
  Integers whole[rows][kGates];
  for (int g = 0; g < kGates; ++g) {
    const Integers none = -load_as<Integers>(m.of_middle.data() + at + g * kGroup, kLanes);
#pragma GCC unroll 8  // or the sums would lie in memory
    for (int r = 0; r < rows; ++r) whole[r][g] = none;
  }
  for (int64_t q = 0; q < m.quads; ++q) {
    Integers w[kGates];
    for (int g = 0; g < kGates; ++g) w[g] = m.word(group, q, g * kGroup + channel % kGroup);
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, before + r * size + 4 * q, sizeof four);
      for (int g = 0; g < kGates; ++g) whole[r][g] = add_bytes(whole[r][g], Integers{} + four, w[g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < kGates; ++g)
      sums[r][g] = load(s.gates + (r * kGates + g) * s.hidden + channel, count) +
                   to_floats(whole[r][g]) * load(m.steps.data() + at + g * kGroup, kLanes);
}

template <int rows, bool kBytes>
void advance(const Step& s, int64_t channel, int64_t count) {
  const int64_t H = s.hidden;
  Sums<rows> sums;
  if constexpr (kBytes)
    multiply_bytes<rows>(s, channel, count, sums);
  else
    multiply<rows>(s, channel, count, sums);
  // With e = e^-x, sigmoid is 1 / (1 + e) and tanh (1 - e²) / (1 + e²): one division makes the cell, one the output. In
  // two loops, because a processor overlaps as many rows as it has instructions in sight.
  for (int r = 0; r < rows; ++r) {
    const Vec i = falling<kBytes>(sums[r][kInput]) + 1.0f, f = falling<kBytes>(sums[r][kForget]) + 1.0f;
    const Vec g = falling<kBytes>(2.0f * sums[r][kCell]), ig = i * (g + 1.0f);
    float* cell = s.cell + r * H + channel;
    const Vec c = (load(cell, count) * ig + (1.0f - g) * f) / (f * ig);
    store(cell, c, count);
    sums[r][kCell] = c;
  }
  for (int r = 0; r < rows; ++r) {
    const Vec e = falling<kBytes>(2.0f * sums[r][kCell]), o = falling<kBytes>(sums[r][kOutput]) + 1.0f;
    const Vec h = (1.0f - e) / ((e + 1.0f) * o);
    store(s.after + r * H + channel, h, count);
    if (kBytes) Hidden::put(s.bytes_after + r * Hidden::size(H) + channel, h);
  }
}

// Channels outside: their weights are in the nearest cache when the next rows need them.
template <bool kBytes>
void over_rows(const Step& first, int64_t rows) {
  for (int64_t channel = 0; channel < first.hidden; channel += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, first.hidden - channel);
    Step s = first;
    int64_t left = rows;
    for (int64_t blocks = (rows + kRows - 1) / kRows; blocks; --blocks) {
      const int64_t now = left / blocks;  // as even as can be
      with_constant<kRows>(now, [&](auto many) {
        count == kLanes ? advance<decltype(many)::value, kBytes>(s, channel, kLanes)
                        : advance<decltype(many)::value, kBytes>(s, channel, count);
      });
      s.skip(now);
      left -= now;
    }
  }
}

// h of some rows in bytes, before and after a step: two halves in turn.
class HiddenBytes {
 public:
  HiddenBytes(int64_t sets, int64_t rows, int64_t hidden) : size_(rows * Hidden::size(hidden)) {
    bytes_.resize(static_cast<size_t>(2 * sets * size_));
    turns_.resize(static_cast<size_t>(sets));
  }

  void begin(int64_t set, const float* h, int64_t rows, int64_t hidden) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t channel = 0; channel < hidden; channel += kLanes) {
        const Vec v = load(h + r * hidden + channel, std::min<int64_t>(kLanes, hidden - channel));
        Hidden::put(half(set, 0) + r * Hidden::size(hidden) + channel, at_most(at_least(v, -1.0f), 1.0f));
      }
    turns_[static_cast<size_t>(set)] = 0;
  }

  void step(int64_t set, Step* s) {
    int& turn = turns_[static_cast<size_t>(set)];
    s->bytes_before = half(set, turn);
    turn = 1 - turn;
    s->bytes_after = half(set, turn);
  }

 private:
  uint8_t* half(int64_t set, int turn) { return bytes_.data() + (2 * set + turn) * size_; }

  int64_t size_;
  std::vector<uint8_t> bytes_;
  std::vector<int> turns_;
};

}  // namespace

void lstm(const EdgesepLstm* s, int64_t first, int64_t end) {
  const int64_t blocks = edgesep_lstm_blocks(s), H = s->hidden, most = (s->rows + blocks - 1) / blocks;
  std::vector<float> cells;
  std::vector<float> widened;
  std::optional<ByteMatrix> matrix;
  std::optional<HiddenBytes> bytes;
  if constexpr (kIntegerProducts) {
    if (s->bytes) matrix.emplace(*s), bytes.emplace(s->sets, most, H);
  } else if (s->bytes) {
    widened = as_floats(*s);
  }
  const float* recurrent = s->bytes ? widened.data() : s->recurrent;
  for (int64_t block = first; block < end; ++block) {
    const int64_t begin = s->rows * block / blocks, rows = s->rows * (block + 1) / blocks - begin, size = rows * H;
    cells.resize(static_cast<size_t>(s->sets * size));
    const auto of_set = [&](int64_t set) { return (set * s->rows + begin) * H; };
    for (int64_t set = 0; set < s->sets; ++set) {
      std::copy_n(s->initial_c + of_set(set), size, cells.data() + set * size);
      if (bytes) bytes->begin(set, s->initial_h + of_set(set), rows, H);
    }
    for (int64_t l = 0; l < s->steps; ++l)
      for (int64_t set = 0; set < s->sets; ++set) {
        float* after = s->y + l * s->sets * s->rows * H + of_set(set);
        const float* before = l ? after - s->sets * s->rows * H : s->initial_h + of_set(set);
        const int64_t frame = s->order ? s->order[l * s->sets + set] : l;
        if (frame < 0) {
          std::copy_n(before, size, after);
          continue;
        }
        Step step{recurrent, H, s->gates + (frame * s->rows + begin) * kGates * H, before,
                  cells.data() + set * size, after};
        if (bytes) {
          step.matrix = &*matrix;
          bytes->step(set, &step);
        }
        (bytes ? over_rows<kIntegerProducts> : over_rows<false>)(step, rows);
      }
    for (int64_t set = 0; set < s->sets; ++set) {
      const float* last = s->y + (s->steps - 1) * s->sets * s->rows * H + of_set(set);
      if (s->last_h) std::copy_n(last, size, s->last_h + of_set(set));
      if (s->last_c) std::copy_n(cells.data() + set * size, size, s->last_c + of_set(set));
    }
  }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
