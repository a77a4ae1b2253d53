// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "unfolded_product.h"

#include <algorithm>
#include <cstring>

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kWide = 2;  // registers of outputs: with kUnfoldedBlocks, as many sums as there are registers

constexpr int64_t kSide = 16;  // channels side by side

struct Channels {
  Vec v[kSide / kLanes];

  Channels operator-(const Channels& other) const {
    Channels made;
    for (int i = 0; i < kSide / kLanes; ++i) made.v[i] = v[i] - other.v[i];
    return made;
  }
};

// 2 taps - 1 steps become the parts of `taps` windows.
template <int taps>
inline float* split_parts(const Channels* x, int64_t apart, float* parts) {
  if constexpr (taps == 1) {
    std::memcpy(parts, x, sizeof *x);
    return parts + apart;
  } else {
    constexpr int half = taps / 2;
    Channels less[taps - 1];
    parts = split_parts<half>(x + half, apart, parts);
    for (int i = 0; i < taps - 1; ++i) less[i] = x[i] - x[i + half];
    parts = split_parts<half>(less, apart, parts);
    for (int i = 0; i < taps - 1; ++i) less[i] = x[i + taps] - x[i + half];
    return split_parts<half>(less, apart, parts);
  }
}

// Taps of a register of outputs become the sums of them.
template <int taps>
inline float* sum_taps(const Vec* w, int64_t apart, float* to) {
  if constexpr (taps == 1) {
    store(to, *w, kLanes);
    return to + apart;
  } else {
    constexpr int half = taps / 2;
    Vec both[half];
    for (int i = 0; i < half; ++i) both[i] = w[i] + w[i + half];
    to = sum_taps<half>(both, apart, to);
    to = sum_taps<half>(w, apart, to);
    return sum_taps<half>(w + half, apart, to);
  }
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

  int64_t channels, side;  // pairs of them, where weights are pairs
  const float *x, *weight;

  __attribute__((always_inline)) void part(Sums<blocks>& sums) {
    for (int64_t left = channels; left > 0; left -= side, x += kUnfoldedBlocks * kSide)
      for (int64_t c = 0; c < std::min(left, side); ++c, weight += kUnfoldedGroup) {
        const float *const from = x + c * Number::kMet, *const by = weight;
        Vec w[kWide];
        for (int v = 0; v < kWide; ++v) w[v] = load(by + v * kLanes, kLanes);
        for (int b = 0; b < blocks; ++b)
          for (int v = 0; v < kWide; ++v) sums[b][v] = Number::add(sums[b][v], w[v], from + b * kSide);
      }
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
void product(const float* parts, int64_t blocks, int64_t channels, int64_t side, int64_t taps, const float* weight,
             int64_t outputs, const float* scale, int64_t windows, float* y) {
  const int64_t group = edgesep_unfolded_parts(taps) * channels * kUnfoldedGroup;
  with_constant<kUnfoldedBlocks>(blocks, [&](auto known) {
    constexpr int kBlocks = decltype(known)::value;
    Sums<kBlocks> sums[kUnfoldedTaps];
    for (int64_t from = 0; from < outputs; from += kWide * kLanes) {
      Product<Number, kBlocks> made{channels, side, parts, weight + from / kUnfoldedGroup * group + from % kUnfoldedGroup};
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

int64_t unfolded_size(int64_t channels, int64_t taps) {
  return edgesep_unfolded_parts(taps) * ((channels + kSide - 1) / kSide * kSide) * kUnfoldedBlocks;
}

void unfold(const float* const* rows, int64_t channels, int64_t taps, int64_t blocks, bool pairs, float* parts) {
  const auto split = taps == 8 ? split_parts<8> : split_parts<4>;
  const int64_t steps = 2 * taps - 1, apart = unfolded_size(channels, taps) / edgesep_unfolded_parts(taps);
  Channels x[2 * kUnfoldedTaps - 1];
  for (int64_t from = 0; from < channels; from += kSide)
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < steps; ++i)
        for (int64_t v = 0; v < kSide; v += kLanes) {
          const int64_t count = std::min<int64_t>(kLanes, std::max<int64_t>(0, channels - from - v));
          x[i].v[v / kLanes] = load(rows[b * steps + i] + from + v, count);
        }
      float* const to = parts + from * kUnfoldedBlocks + b * kSide;
      split(x, apart, to);
      for (int64_t part = 0; pairs && kPairProducts && part < edgesep_unfolded_parts(taps); ++part)
        to_pairs(to + part * apart, kSide, to + part * apart);  // in place: two become one
    }
}

void unfold_bytes(const int8_t* bytes, const float* scale, int64_t channels, int64_t taps, int64_t outputs,
                  float* weight) {
  const auto sums = taps == 8 ? sum_taps<8> : sum_taps<4>;
  const int64_t apart = channels * kUnfoldedGroup, units = taps * channels / 4, group = EDGESEP_WINDOW_GROUP;
  for (int64_t n = 0; n < outputs; n += kLanes) {
    float* const to = weight + n / kUnfoldedGroup * edgesep_unfolded_parts(taps) * apart + n % kUnfoldedGroup;
    const int64_t count = std::min<int64_t>(kLanes, outputs - n);
    const Vec factor = load(scale + n, count);
    for (int64_t c = 0; c < channels; ++c) {
      Vec w[kUnfoldedTaps];
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t input = k * channels + c;
        const int8_t* const from = bytes + ((n / group * units + input / 4) * group + n % group) * 4 + input % 4;
        float lanes[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] = from[4 * i];
        w[k] = load(lanes, kLanes) * factor;
      }
      sums(w, apart, to + c * kUnfoldedGroup);
    }
  }
}

void unfolded_product(const float* parts, int64_t blocks, int64_t channels, int64_t taps, const float* weight,
                      int64_t outputs, const float* scale, int64_t windows, bool pairs, float* y) {
  const auto of = pairs ? product<Pair> : product<Single>;
  of(parts, blocks, pairs ? channels / 2 : channels, pairs ? kSide / 2 : kSide, taps, weight, outputs, scale, windows, y);
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
