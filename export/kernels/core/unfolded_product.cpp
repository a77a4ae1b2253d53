// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "unfolded_product.h"

#include <algorithm>
#include <array>

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kWide = 2;  // registers of outputs: with kUnfoldedBlocks, as many sums as there are registers

// Of one channel: step i of block b is x[i * blocks + b]; 2 taps - 1 steps become the parts of `taps` windows.
template <int taps>
float* split_parts(const float* x, int64_t blocks, int64_t apart, float* parts) {
  if constexpr (taps == 1) {
    std::copy(x, x + blocks, parts);
    return parts + apart;
  } else {
    constexpr int64_t half = taps / 2, steps = taps - 1;
    float less[steps * kUnfoldedBlocks] = {};
    parts = split_parts<half>(x + half * blocks, blocks, apart, parts);
    for (int64_t i = 0; i < steps * blocks; ++i) less[i] = x[i] - x[i + half * blocks];
    parts = split_parts<half>(less, blocks, apart, parts);
    for (int64_t i = 0; i < steps * blocks; ++i) less[i] = x[i + taps * blocks] - x[i + half * blocks];
    return split_parts<half>(less, blocks, apart, parts);
  }
}

template <typename F>
void with_taps(int64_t taps, F f) {
  taps == 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 4>{});
}

// Outputs of a few blocks of windows, one window of each.
template <int blocks>
using Sums = Vec[blocks][kWide];

// Meets part after part. Sums start in registers and are stored when they are complete: what is summed on top of them, or
// below them, is added then.
template <class Number, int blocks>
struct Product {
  using Bases = std::array<const Sums<blocks>*, 3>;  // of `count` of them, one for each window

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

  // finish(i, sums) of window i of each block.
  template <int taps, int count, class Finish>
  void meet(const Bases& bases, const Finish& finish) {
    const auto complete = [&](int i, Sums<blocks>& sums) __attribute__((always_inline)) {
      for (int k = 0; k < count; ++k)
        for (int b = 0; b < blocks; ++b)
          for (int v = 0; v < kWide; ++v) sums[b][v] += bases[k][i][b][v];
      finish(i, sums);
    };
    if constexpr (taps == 2) {
      Sums<blocks> sums{}, shared;
      part(sums);
      std::memcpy(&shared, &sums, sizeof sums);
      part(sums);
      complete(0, sums);
      std::memcpy(&sums, &shared, sizeof sums);
      part(sums);
      complete(1, sums);
    } else {
      constexpr int half = taps / 2;
      Sums<blocks> shared[half];
      meet<half, 0>({}, [&](int i, const Sums<blocks>& sums) { std::memcpy(&shared[i], &sums, sizeof sums); });
      for (int part = 0; part < 2; ++part) {
        Bases more{};
        for (int k = 0; k < count; ++k) more[k] = bases[k] + part * half;
        more[count] = shared;
        meet<half, count + 1>(more, [&](int i, const Sums<blocks>& sums) { finish(part * half + i, sums); });
      }
    }
  }
};

template <class Number>
void product(const float* parts, int64_t blocks, int64_t channels, int64_t taps, const float* weight,
             int64_t outputs, const float* scale, int64_t windows, float* y) {
  const int64_t group = edgesep_unfolded_parts(taps) * channels * kUnfoldedGroup;
  with_taps(taps, [&](auto known) {
    with_constant<kUnfoldedBlocks>(blocks, [&](auto count) {
      constexpr int kTaps = decltype(known)::value, kBlocks = decltype(count)::value;
      for (int64_t from = 0; from < outputs; from += kWide * kLanes) {
        Product<Number, kBlocks> made{channels, parts, weight + from / kUnfoldedGroup * group + from % kUnfoldedGroup};
        made.template meet<kTaps, 0>({}, [&](int i, const Sums<kBlocks>& sums) {
          for (int b = 0; b < kBlocks; ++b) {
            const int64_t m = b * kTaps + i;
            if (m >= windows) break;
            const float factor = scale ? scale[m] : 1;
            for (int v = 0; v < kWide; ++v) {
              const int64_t count = std::min<int64_t>(kLanes, outputs - from - v * kLanes);
              if (count > 0) store(y + m * outputs + from + v * kLanes, sums[b][v] * factor, count);
            }
          }
        });
      }
    });
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
    with_taps(taps, [&](auto known) {
      split_parts<decltype(known)::value>(steps, blocks, channels * blocks, parts + c * blocks);
    });
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
