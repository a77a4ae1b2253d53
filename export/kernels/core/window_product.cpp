// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// Overlapping windows as rows of one matrix are up to `taps` copies of the same map. Here a window is a few pointers to
// its rows. A few windows meet a strip of the matrix at a time: as many sums as there are registers.
#include "window_product.h"

#include <algorithm>
#include <vector>

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int64_t kGroup = EDGESEP_WINDOW_GROUP, kBlock = EDGESEP_WINDOW_BLOCK;
constexpr int kWindows = kRegisters == 32 ? 6 : 4, kWide = kRegisters == 32 ? 4 : 2;

// Windows from `first` on, and outputs from `from` on.
struct Tile {
  int64_t first, from;
  const float* zeros;  // a row of them
};

template <class Number, int windows, int wide>
void multiply(const EdgesepWindows& s, const Tile& tile) {
  const int64_t group = tile.from / kGroup;
  const auto outputs = [&](int v) {
    return std::min<int64_t>(kLanes, std::max<int64_t>(0, s.outputs - tile.from - v * kLanes));
  };
  const float* weight = s.weight + group * s.taps * s.inputs * kGroup + tile.from % kGroup;
  Vec sums[windows][wide];
  for (int v = 0; v < wide; ++v) {
    const Vec bias = load(s.bias + tile.from + v * kLanes, outputs(v));
    for (int m = 0; m < windows; ++m) sums[m][v] = bias;
  }
  for (int64_t k = 0; k < s.taps; ++k) {
    const float* x[windows];
    for (int m = 0; m < windows; ++m) {
      const int64_t row = s.index ? s.index[(tile.first + m) * s.taps + k] : tile.first + m;
      x[m] = row < 0 ? tile.zeros : s.x + row * s.inputs;
    }
    for (int64_t c = 0; c < s.inputs; ++c, weight += kGroup) {
      Vec w[wide];
      for (int v = 0; v < wide; ++v) w[v] = load(weight + v * kLanes, kLanes);
      for (int m = 0; m < windows; ++m)
        for (int v = 0; v < wide; ++v) sums[m][v] = Number::add(sums[m][v], w[v], x[m] + c);
    }
  }
  for (int v = 0; v < wide; ++v) {
    const int64_t count = outputs(v), at = tile.first * s.outputs + tile.from + v * kLanes;
    for (int m = 0; m < windows && count > 0; ++m) {
      Vec y = sums[m][v];
      if (s.slope) {
        const Vec less = y * load(s.slope + tile.from + v * kLanes, count);
        y = y > less ? y : less;
      }
      if (s.residual) y += load(s.residual + at + m * s.outputs, count);
      store(s.y + at + m * s.outputs, y, count);
    }
  }
}

template <class Number>
void product(const EdgesepWindows* s, int64_t first, int64_t end) {
  const std::vector<float> zeros(static_cast<size_t>(s->inputs));
  const int64_t begin = first * kBlock, stop = std::min(end * kBlock, s->windows);
  for (int64_t from = 0; from < s->outputs; from += kWide * kLanes) {  // a strip of the matrix at a time
    const auto strip = [&](auto wide) {
      for (int64_t m = begin; m < stop; m += kWindows)
        with_constant<kWindows>(std::min<int64_t>(kWindows, stop - m), [&](auto windows) {
          multiply<Number, decltype(windows)::value, decltype(wide)::value>(*s, {m, from, zeros.data()});
        });
    };
    if (s->outputs - from > (kWide - 1) * kLanes)
      strip(std::integral_constant<int, kWide>{});
    else  // the last one, of fewer outputs
      strip(std::integral_constant<int, kWide - 1>{});
  }
}

}  // namespace

void window_product(const EdgesepWindows* s, int64_t first, int64_t end) {
  s->pairs ? product<Pair>(s, first, end) : product<Single>(s, first, end);
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
