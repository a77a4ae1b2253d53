// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// A step of a few rows is a small product, which runtimes start, spread over threads and wait for at every step. Here a
// thread takes rows through all steps: the four gates of a register of hidden channels are summed side by side, and what
// becomes of them is computed before they leave the registers.
#include "lstm_steps.h"

#include <algorithm>
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

// Rows that take the same step.
struct Step {
  const float* recurrent;
  int64_t hidden;
  const float *gates, *before;  // of the first row
  float *cell, *after;

  void skip(int64_t rows) {
    gates += rows * kGates * hidden;
    before += rows * hidden;
    cell += rows * hidden;
    after += rows * hidden;
  }
};

template <int rows>
void advance(const Step& s, int64_t channel, int64_t count) {
  const int64_t H = s.hidden;
  Vec sums[rows][kGates];
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < kGates; ++g) sums[r][g] = load(s.gates + (r * kGates + g) * H + channel, count);
  const float* weight = s.recurrent + channel / kGroup * H * kGates * kGroup + channel % kGroup;
  for (int64_t k = 0; k < H; ++k, weight += kGates * kGroup) {
    Vec w[kGates];
    for (int g = 0; g < kGates; ++g) w[g] = load(weight + g * kGroup, kLanes);
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < kGates; ++g) sums[r][g] += w[g] * s.before[r * H + k];
  }
  for (int r = 0; r < rows; ++r) {
    // With e = e^-x, sigmoid is 1 / (1 + e) and tanh (1 - e²) / (1 + e²): one division makes the cell, one the output.
    const Vec i = falling(sums[r][kInput]) + 1.0f, f = falling(sums[r][kForget]) + 1.0f;
    const Vec o = falling(sums[r][kOutput]) + 1.0f, g = falling(2.0f * sums[r][kCell]), ig = i * (g + 1.0f);
    float* cell = s.cell + r * H + channel;
    const Vec c = (load(cell, count) * ig + (1.0f - g) * f) / (f * ig);
    store(cell, c, count);
    const Vec e = falling(2.0f * c);
    store(s.after + r * H + channel, (1.0f - e) / ((e + 1.0f) * o), count);
  }
}

// Channels outside: their weights are in the nearest cache when the next rows need them.
void over_rows(const Step& first, int64_t rows) {
  for (int64_t channel = 0; channel < first.hidden; channel += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, first.hidden - channel);
    Step s = first;
    int64_t left = rows;
    for (int64_t blocks = (rows + kRows - 1) / kRows; blocks; --blocks) {
      const int64_t now = left / blocks;  // as even as can be
      with_constant<kRows>(now, [&](auto many) {
        count == kLanes ? advance<decltype(many)::value>(s, channel, kLanes)
                        : advance<decltype(many)::value>(s, channel, count);
      });
      s.skip(now);
      left -= now;
    }
  }
}

}  // namespace

void lstm(const EdgesepLstm* s, int64_t first, int64_t end) {
  const int64_t blocks = edgesep_lstm_blocks(s), H = s->hidden;
  std::vector<float> cells;
  for (int64_t block = first; block < end; ++block) {
    const int64_t begin = s->rows * block / blocks, rows = s->rows * (block + 1) / blocks - begin, size = rows * H;
    cells.resize(static_cast<size_t>(s->sets * size));
    const auto of_set = [&](int64_t set) { return (set * s->rows + begin) * H; };
    for (int64_t set = 0; set < s->sets; ++set)
      std::copy_n(s->initial_c + of_set(set), size, cells.data() + set * size);
    for (int64_t l = 0; l < s->steps; ++l)
      for (int64_t set = 0; set < s->sets; ++set) {
        float* after = s->y + l * s->sets * s->rows * H + of_set(set);
        const float* before = l ? after - s->sets * s->rows * H : s->initial_h + of_set(set);
        const int64_t frame = s->order ? s->order[l * s->sets + set] : l;
        if (frame < 0)
          std::copy_n(before, size, after);
        else
          over_rows({s->recurrent, H, s->gates + (frame * s->rows + begin) * kGates * H, before,
                     cells.data() + set * size, after},
                    rows);
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
