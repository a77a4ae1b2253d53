// What products of windows in float and in eight bits share: a few windows meet a strip of the matrix at a time, as many
// sums as there are registers. A window is a few pointers to its rows.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"
#include "window_product.h"

namespace edgesep {
namespace EDGESEP_ISA {

constexpr int64_t kGroup = EDGESEP_WINDOW_GROUP, kBlock = EDGESEP_WINDOW_BLOCK;
constexpr int kWindows = 6, kWide = kRegisters == 32 ? 4 : 2;

// Windows from `first` on, and outputs from `from` on.
struct Tile {
  int64_t first, from;
  const float* nothing;  // a row of that
};

// What follows the product for a register of outputs of a window: `at`, of all outputs.
inline void finish(const EdgesepWindows& s, Vec y, int64_t window, int64_t at, int64_t count) {
  if (s.slope) {
    const Vec less = y * load(s.slope + at, count);
    y = y > less ? y : less;
  }
  if (s.residual) y += load(s.residual + window * s.outputs + at, count);
  store(s.y + window * s.outputs + at, y, count);
}

// Of sums in float: what they begin with for `count` outputs from `at` on, and what those of a window come to.
template <class Number>
struct Sums {
  static Vec begin(const EdgesepWindows& s, int64_t at, int64_t count) { return load(s.bias + at, count); }
  static Vec end(const EdgesepWindows&, Vec sums, int64_t, int64_t, int64_t) { return sums; }
};

// Where all lanes are outputs (`whole`), nobody counts them: that would cost as much as a few dozen inputs.
template <class Number, int windows, int wide, bool whole>
inline void multiply(const EdgesepWindows& s, const Tile& tile) {
  const int64_t group = tile.from / kGroup;
  const auto outputs = [&](int v) -> int64_t {
    return whole ? kLanes : std::min<int64_t>(kLanes, std::max<int64_t>(0, s.outputs - tile.from - v * kLanes));
  };
  const float* weight = s.weight + group * s.taps * s.inputs * kGroup + tile.from % kGroup;
  // Every loop is unrolled, or the compiler keeps sums in memory.
  Vec sums[windows][wide];
#pragma GCC unroll 4
  for (int v = 0; v < wide; ++v) {
    const Vec begin = Sums<Number>::begin(s, tile.from + v * kLanes, outputs(v));
#pragma GCC unroll 8
    for (int m = 0; m < windows; ++m) sums[m][v] = begin;
  }
  for (int64_t k = 0; k < s.taps; ++k) {
    const float* x[windows];
#pragma GCC unroll 8
    for (int m = 0; m < windows; ++m) {
      const int64_t row = s.index ? s.index[(tile.first + m) * s.taps + k] : tile.first + m;
      x[m] = row < 0 ? tile.nothing : s.x + row * s.inputs * Number::kMet;
    }
    for (int64_t c = 0; c < s.inputs; ++c, weight += kGroup) {
      Vec w[wide];
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) w[v] = load(weight + v * kLanes, kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < windows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < wide; ++v) sums[m][v] = Number::add(sums[m][v], w[v], x[m] + c * Number::kMet);
    }
  }
  Vec made[windows][wide];
#pragma GCC unroll 8
  for (int m = 0; m < windows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) made[m][v] = sums[m][v];
#pragma GCC unroll 1  // of what follows one copy is enough, and does not get into the way of the sums
  for (int v = 0; v < wide; ++v) {
    const int64_t count = outputs(v), at = tile.from + v * kLanes;
#pragma GCC unroll 1
    for (int m = 0; m < windows && count > 0; ++m)
      finish(s, Sums<Number>::end(s, made[m][v], tile.first + m, at, count), tile.first + m, at, count);
  }
}

// nothing: the row that stands for one that is not there.
template <class Number>
inline void product(const EdgesepWindows* s, const float* nothing, int64_t first, int64_t end) {
  const int64_t blocks = edgesep_window_blocks(s);
  while (first < end) {  // what there is of a group of outputs: a strip of the matrix meets all of its windows
    const int64_t group = first / blocks, last = std::min(end, (group + 1) * blocks);
    const int64_t begin = first % blocks * kBlock, stop = std::min((last - group * blocks) * kBlock, s->windows);
    const int64_t outputs = std::min(s->outputs, (group + 1) * kGroup);
    for (int64_t from = group * kGroup; from < outputs; from += kWide * kLanes) {
      const auto strip = [&](auto wide) {
        constexpr int kStrip = decltype(wide)::value;
        int64_t m = begin;
        for (; m + kWindows <= stop && from + kStrip * kLanes <= outputs; m += kWindows)
          multiply<Number, kWindows, kStrip, true>(*s, {m, from, nothing});
        for (; m < stop; m += kWindows)
          with_constant<kWindows>(std::min<int64_t>(kWindows, stop - m), [&](auto windows) {
            multiply<Number, decltype(windows)::value, kStrip, false>(*s, {m, from, nothing});
          });
      };
      if (outputs - from > (kWide - 1) * kLanes)
        strip(std::integral_constant<int, kWide>{});
      else  // the last one, of fewer outputs
        strip(std::integral_constant<int, kWide - 1>{});
    }
    first = last;
  }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
