// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "unfolded_product.h"

#include <algorithm>

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kWide = 2;  // registers of outputs: with kUnfoldedBlocks, as many sums as there are registers

// Of one channel: step i of block b is x[i * blocks + b]; 2 taps - 1 steps become the parts of `taps` windows.
float* split_parts(const float* x, int64_t taps, int64_t blocks, int64_t apart, float* parts) {
  if (taps == 1) {
    std::copy(x, x + blocks, parts);
    return parts + apart;
  }
  const int64_t half = taps / 2, size = (taps - 1) * blocks;
  float less[(kUnfoldedTaps - 1) * kUnfoldedBlocks];
  parts = split_parts(x + half * blocks, half, blocks, apart, parts);
  for (int64_t i = 0; i < size; ++i) less[i] = x[i] - x[i + half * blocks];
  parts = split_parts(less, half, blocks, apart, parts);
  for (int64_t i = 0; i < size; ++i) less[i] = x[i + taps * blocks] - x[i + half * blocks];
  return split_parts(less, half, blocks, apart, parts);
}

// Outputs of a few blocks of windows, one window of each.
template <int blocks>
using Sums = Vec[blocks][kWide];

// Meets part after part.
template <class Number, int blocks>
struct Product {
  // Of windows like those of a result: what is added when its sums are complete, or null. Two, for three halvings.
  struct Below {
    const Sums<blocks>*near, *far;

    Below behind(int64_t windows) const { return {near ? near + windows : near, far ? far + windows : far}; }
  };

  int64_t channels;
  const float *x, *weight;

  __attribute__((always_inline)) void part(Sums<blocks>& sums) {
    for (int64_t c = 0; c < channels; ++c) {
      const float *const from = x + c * blocks, *const by = weight + c * kUnfoldedGroup;
      Vec w[kWide];
      for (int v = 0; v < kWide; ++v) w[v] = load(by + v * kLanes, kLanes);
      for (int b = 0; b < blocks; ++b)
        for (int v = 0; v < kWide; ++v) sums[b][v] = Number::add(sums[b][v], w[v], from + b);
    }
    x += channels * blocks;
    weight += channels * kUnfoldedGroup;
  }

  static void complete(const Sums<blocks>& sums, const Below& below, Sums<blocks>& y) {
    for (int b = 0; b < blocks; ++b)
      for (int v = 0; v < kWide; ++v) {
        Vec sum = sums[b][v];
        if (below.near) sum += (*below.near)[b][v];
        if (below.far) sum += (*below.far)[b][v];
        y[b][v] = sum;
      }
  }

  // `taps` windows of each block.
  void meet(int64_t taps, const Below& below, Sums<blocks>* y) {
    if (taps == 2) {
      Sums<blocks> sums{}, shared;
      part(sums);
      std::memcpy(&shared, &sums, sizeof sums);
      part(sums);
      complete(sums, below, y[0]);
      std::memcpy(&sums, &shared, sizeof sums);
      part(sums);
      complete(sums, below.behind(1), y[1]);
    } else {
      const int64_t half = taps / 2;
      Sums<blocks> shared[kUnfoldedTaps / 2];
      meet(half, {}, shared);
      meet(half, {shared, below.near}, y);
      meet(half, {shared, below.behind(half).near}, y + half);
    }
  }
};

template <class Number>
void product(const float* parts, int64_t blocks, int64_t channels, int64_t taps, const float* weight,
             int64_t outputs, const float* scale, int64_t windows, float* y) {
  const int64_t group = edgesep_unfolded_parts(taps) * channels * kUnfoldedGroup;
  with_constant<kUnfoldedBlocks>(blocks, [&](auto known) {
    constexpr int kBlocks = decltype(known)::value;
    Sums<kBlocks> sums[kUnfoldedTaps];
    for (int64_t from = 0; from < outputs; from += kWide * kLanes) {
      Product<Number, kBlocks> made{channels, parts, weight + from / kUnfoldedGroup * group + from % kUnfoldedGroup};
      made.meet(taps, {}, sums);
      for (int64_t m = 0; m < windows; ++m) {
        const float factor = scale ? scale[m] : 1;
        for (int v = 0; v < kWide; ++v) {
          const int64_t count = std::min<int64_t>(kLanes, outputs - from - v * kLanes);
          if (count > 0) store(y + m * outputs + from + v * kLanes, sums[m % taps][m / taps][v] * factor, count);
        }
      }
    }
  });
}

}  // namespace

void unfold(const float* x, int64_t length, int64_t channels, int64_t taps, int64_t blocks, bool pairs,
            float* parts) {
  float steps[(2 * kUnfoldedTaps - 1) * kUnfoldedBlocks];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < 2 * taps - 1; ++i)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t step = b * taps + i;
        steps[i * blocks + b] = step < length ? x[step * channels + c] : 0;
      }
    split_parts(steps, taps, blocks, channels * blocks, parts + c * blocks);
  }
  if (!pairs) return;
  for (int64_t part = 0; part < edgesep_unfolded_parts(taps) * channels / 2; ++part)  // in place: two rows become one
    for (int64_t b = 0; b < blocks; ++b) {
      const float* const both = parts + 2 * part * blocks + b;
      const float values[] = {both[0], both[blocks]};
      to_pairs(values, 2, parts + part * blocks + b);
    }
}

void unfolded_product(const float* parts, int64_t blocks, int64_t channels, int64_t taps, const float* weight,
                      int64_t outputs, const float* scale, int64_t windows, bool pairs, float* y) {
  const auto of = pairs ? product<Pair> : product<Single>;
  of(parts, blocks, pairs ? channels / 2 : channels, taps, weight, outputs, scale, windows, y);
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
