// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// A step of a few rows is a small product, which runtimes start, spread over threads and wait for at every step. Here a
// thread takes rows through all steps: the four gates of a register of hidden channels are summed side by side, and what
// becomes of them is computed before they leave the registers.
#include "lstm_steps.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kGates = 4, kInput = 0, kOutput = 1, kForget = 2, kCell = 3;
constexpr int64_t kGroup = EDGESEP_LSTM_GROUP;
constexpr int kRows = kLanes == 16 ? 6 : 2;  // with four gates each, as many as stay in registers

// e^-x of what sigmoid and tanh make of x, held where three of them can be multiplied; beyond that both are flat.
inline Vec falling(Vec x) { return exp2_within(at_most(at_least(x * -kLog2E, -36.0f), 36.0f)); }

constexpr int64_t kWorth = 16;  // products with a row: rounding the matrix takes as long as some of them

// The matrix in eight bits, with a step for each channel of each gate: value = step * integer.
struct Rounded {
  int64_t quads;                   // hidden channels, four at a time
  std::vector<int32_t> weights;    // (groups, quads, gates, kGroup), a byte for each channel of a quad
  std::vector<float> steps;        // (groups, gates, kGroup), times that of h
  std::vector<int32_t> of_middle;  // what kMiddle in place of every h would make

  Rounded(const float* recurrent, int64_t hidden) : quads((hidden + 3) / 4) {
    const int64_t groups = (hidden + kGroup - 1) / kGroup;
    weights.resize(static_cast<size_t>(groups * quads * kGates * kGroup));
    steps.resize(static_cast<size_t>(groups * kGates * kGroup));
    of_middle.resize(steps.size());
    constexpr int kWide = kGates * kGroup / kLanes;  // registers of a row of the matrix
    for (int64_t group = 0; group < groups; ++group) {
      const float* from = recurrent + group * hidden * kGates * kGroup;
      Vec most[kWide];
      for (int v = 0; v < kWide; ++v) most[v] = splat(1e-30f);
      for (int64_t k = 0; k < hidden; ++k)
        for (int v = 0; v < kWide; ++v) {
          const Vec size = magnitude(load(from + k * kGates * kGroup + v * kLanes, kLanes));
          most[v] = size > most[v] ? size : most[v];
        }
      Vec finer[kWide];
      for (int v = 0; v < kWide; ++v) {
        finer[v] = kMost / most[v];
        store(steps.data() + group * kGates * kGroup + v * kLanes, most[v] / (kMost * kMost), kLanes);
      }
      Integers total[kWide] = {};
      for (int64_t q = 0; q < quads; ++q)
        for (int v = 0; v < kWide; ++v) {
          Integers word{};
          for (int64_t i = 0; i < 4 && 4 * q + i < hidden; ++i) {
            const Integers one = rounded(load(from + (4 * q + i) * kGates * kGroup + v * kLanes, kLanes) * finer[v]);
            total[v] += one;
            word |= (one & 255) << static_cast<int>(8 * i);
          }
          store_as(weights.data() + (group * quads + q) * kGates * kGroup + v * kLanes, word, kLanes);
        }
      for (int v = 0; v < kWide; ++v)
        store_as(of_middle.data() + group * kGates * kGroup + v * kLanes, total[v] * kMiddle, kLanes);
    }
  }

  // Bytes of a row of h, whole registers of them.
  static int64_t size(int64_t hidden) { return (hidden + kGroup - 1) / kGroup * kGroup; }

  static void store_hidden([[maybe_unused]] uint8_t* bytes, [[maybe_unused]] Vec h) {
    if constexpr (kIntegerProducts) store_bytes(bytes, rounded(h * kMost) + kMiddle);
  }

  static constexpr float kMost = 127;
  static constexpr int32_t kMiddle = 128;
};

// Rows that take the same step.
struct Step {
  const float* recurrent;
  int64_t hidden;
  const float *gates, *before;  // of the first row
  float *cell, *after;
  const Rounded* rounded = nullptr;  // with it, h as bytes too
  const uint8_t* bytes_before = nullptr;
  uint8_t* bytes_after = nullptr;

  void skip(int64_t rows) {
    gates += rows * kGates * hidden;
    before += rows * hidden;
    cell += rows * hidden;
    after += rows * hidden;
    if (!rounded) return;
    bytes_before += rows * Rounded::size(hidden);
    bytes_after += rows * Rounded::size(hidden);
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
inline void multiply_rounded(const Step& s, int64_t channel, int64_t count, Sums<rows>& sums) {
  const int64_t quads = s.rounded->quads, size = Rounded::size(s.hidden), at = channel / kGroup * kGates * kGroup;
  const int32_t* weight = s.rounded->weights.data() + at * quads + channel % kGroup;
  const int32_t* of_middle = s.rounded->of_middle.data() + at + channel % kGroup;
  const float* step = s.rounded->steps.data() + at + channel % kGroup;
  const uint8_t* before = s.bytes_before;
  Integers whole[rows][kGates];
  for (int g = 0; g < kGates; ++g) {
    const Integers none = -load_as<Integers>(of_middle + g * kGroup, kLanes);
    for (int r = 0; r < rows; ++r) whole[r][g] = none;
  }
  for (int64_t q = 0; q < quads; ++q, weight += kGates * kGroup) {
    Integers w[kGates];
    for (int g = 0; g < kGates; ++g) w[g] = load_as<Integers>(weight + g * kGroup, kLanes);
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, before + r * size + 4 * q, sizeof four);
      for (int g = 0; g < kGates; ++g) whole[r][g] = add_bytes(whole[r][g], Integers{} + four, w[g]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < kGates; ++g)
      sums[r][g] = load(s.gates + (r * kGates + g) * s.hidden + channel, count) +
                   to_floats(whole[r][g]) * load(step + g * kGroup, kLanes);
}

template <int rows, bool kRounded>
void advance(const Step& s, int64_t channel, int64_t count) {
  const int64_t H = s.hidden;
  Sums<rows> sums;
  if constexpr (kRounded)
    multiply_rounded<rows>(s, channel, count, sums);
  else
    multiply<rows>(s, channel, count, sums);
  for (int r = 0; r < rows; ++r) {
    // With e = e^-x, sigmoid is 1 / (1 + e) and tanh (1 - e²) / (1 + e²): one division makes the cell, one the output.
    const Vec i = falling(sums[r][kInput]) + 1.0f, f = falling(sums[r][kForget]) + 1.0f;
    const Vec o = falling(sums[r][kOutput]) + 1.0f, g = falling(2.0f * sums[r][kCell]), ig = i * (g + 1.0f);
    float* cell = s.cell + r * H + channel;
    const Vec c = (load(cell, count) * ig + (1.0f - g) * f) / (f * ig);
    store(cell, c, count);
    const Vec e = falling(2.0f * c), h = (1.0f - e) / ((e + 1.0f) * o);
    store(s.after + r * H + channel, h, count);
    if (kRounded) Rounded::store_hidden(s.bytes_after + r * Rounded::size(H) + channel, h);
  }
}

// Channels outside: their weights are in the nearest cache when the next rows need them.
template <bool kRounded>
void over_rows(const Step& first, int64_t rows) {
  for (int64_t channel = 0; channel < first.hidden; channel += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, first.hidden - channel);
    Step s = first;
    int64_t left = rows;
    for (int64_t blocks = (rows + kRows - 1) / kRows; blocks; --blocks) {
      const int64_t now = left / blocks;  // as even as can be
      with_constant<kRows>(now, [&](auto many) {
        count == kLanes ? advance<decltype(many)::value, kRounded>(s, channel, kLanes)
                        : advance<decltype(many)::value, kRounded>(s, channel, count);
      });
      s.skip(now);
      left -= now;
    }
  }
}

// h of some rows in bytes, before and after a step: two halves in turn.
class HiddenBytes {
 public:
  HiddenBytes(int64_t sets, int64_t rows, int64_t hidden) : size_(rows * Rounded::size(hidden)) {
    bytes_.resize(static_cast<size_t>(2 * sets * size_));
    turns_.resize(static_cast<size_t>(sets));
  }

  void begin(int64_t set, const float* h, int64_t rows, int64_t hidden) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t channel = 0; channel < hidden; channel += kLanes) {
        const Vec v = load(h + r * hidden + channel, std::min<int64_t>(kLanes, hidden - channel));
        Rounded::store_hidden(half(set, 0) + r * Rounded::size(hidden) + channel, at_most(at_least(v, -1.0f), 1.0f));
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
  std::optional<Rounded> rounded;
  std::optional<HiddenBytes> bytes;
  if (kIntegerProducts && s->rounded && s->steps * s->sets * s->rows >= kWorth) {
    rounded.emplace(s->recurrent, H);
    bytes.emplace(s->sets, most, H);
  }
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
        Step step{s->recurrent, H, s->gates + (frame * s->rows + begin) * kGates * H, before,
                  cells.data() + set * size, after};
        if (bytes) {
          step.rounded = &*rounded;
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
