// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// Few frames meet many past ones: matrix products of runtimes would first copy the whole past into their own order, which
// takes longer than the sums. Here it is read once, as it lies. This is the second pass, the sums of values; the first
// one is in attention_weights.cpp.
#include <algorithm>
#include <vector>

#include "attention_rounded.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int64_t kBlock = 16;  // rows of values that are read together, and as many asked for before they are needed

// Some rows of values from column c of a chunk on, what they weigh, and where their sums go.
struct Rows {
  const float* values;
  int64_t count, stride, next;  // next: how far on lies what is read after them
  const float* weights;         // count x kGroup
  float* y;                     // of the first frame
  int64_t features;
  bool first;  // y holds nothing yet
};

// Adds to `frames` frames in `width` registers of features, `lanes` lanes of the last one.
template <int frames, int width>
inline void combine(const Rows& r, int64_t lanes) {
  const auto size = [&](int w) { return w == width - 1 ? lanes : int64_t{kLanes}; };
  Vec sums[frames][width] = {};
  if (!r.first)
    for (int f = 0; f < frames; ++f)
      for (int w = 0; w < width; ++w) sums[f][w] = load(r.y + f * r.features + w * kLanes, size(w));
  const float *from = r.values, *share = r.weights;
  for (int64_t j = 0; j < r.count; ++j, from += r.stride, share += kGroup) {
    for (int w = 0; w < width; ++w) __builtin_prefetch(from + r.next + w * kLanes, 0, 2);
    for (int w = 0; w < width; ++w) {
      const Vec v = load(from + w * kLanes, size(w));
      for (int f = 0; f < frames; ++f) sums[f][w] += v * share[f];
    }
  }
  for (int f = 0; f < frames; ++f)
    for (int w = 0; w < width; ++w) store(r.y + f * r.features + w * kLanes, sums[f][w], size(w));
}

constexpr int kFrames = kLanes == 16 ? 8 : 4;  // with two registers of features each, as many as stay in registers

template <int frames, class AnyRows>
void over_features(AnyRows r, int64_t width) {
  const auto step = [&](int64_t by) {
    r.values += by;
    r.y += by;
    width -= by;
  };
  for (; width >= 2 * kLanes; step(2 * kLanes)) combine<frames, 2>(r, kLanes);
  for (; width > 0; step(kLanes)) combine<frames, 1>(r, std::min<int64_t>(kLanes, width));
}

// What rounded values are summed in: units of a few rows, whose weights lie side by side in a lane, and so do their values
// for a strip of 4 kLanes features. Weights are integers up to kMost, kZero is taken off values.
struct Quads {  // four rows: weights have eight bits
  enum : int { kRows = 4, kBits = 8, kMost = 255, kZero = 128 };
  static void join(const uint8_t* const* rows, Integers* to) {
    interleave(rows, to);
    for (int v = 0; v < 4; ++v) to[v] ^= 0x80808080;
  }
  static Integers add(Integers sum, Integers weights, Integers values) { return add_bytes(sum, weights, values); }
};
struct Pairs {  // two rows, where a processor has no sums of products of bytes: weights have 15 bits
  enum : int { kRows = 2, kBits = 16, kMost = 32767, kZero = 0 };
  static void join(const uint8_t* const* rows, Integers* to) {
    for (int v = 0; v < 4; ++v)
      to[v] = from_bytes(rows[0] + v * kLanes, kLanes) | from_bytes(rows[1] + v * kLanes, kLanes) << 16;
  }
  static Integers add(Integers sum, Integers weights, Integers values) { return add_halves(sum, values, weights); }
};

constexpr int64_t kStrip = 4 * kLanes, kRounded = 64;  // features that are joined at a time, and rows of them

// Adds units of rows, `wide` registers of features of `frames` frames and `lanes` lanes of the last one, to integers that
// lie where their sums will.
template <class Number, int frames, int wide>
inline void add_rounded(const Integers* values, const int32_t* weights, int64_t units, bool first, float* y,
                        int64_t features, int64_t lanes) {
  const auto size = [&](int w) { return w == wide - 1 ? lanes : int64_t{kLanes}; };
  Integers sums[frames][wide] = {};
  if (!first)
#pragma GCC unroll 8  // or sums would lie in memory
    for (int f = 0; f < frames; ++f)
#pragma GCC unroll 2
      for (int w = 0; w < wide; ++w) sums[f][w] = load_as<Integers>(y + f * features + w * kLanes, size(w));
  for (int64_t u = 0; u < units; ++u, values += 4, weights += kGroup) {
    Integers v[wide];
    for (int w = 0; w < wide; ++w) v[w] = values[w];
#pragma GCC unroll 8
    for (int f = 0; f < frames; ++f)
#pragma GCC unroll 2
      for (int w = 0; w < wide; ++w) sums[f][w] = Number::add(sums[f][w], Integers{} + weights[f], v[w]);
  }
#pragma GCC unroll 8
  for (int f = 0; f < frames; ++f)
#pragma GCC unroll 2
    for (int w = 0; w < wide; ++w) store_as(y + f * features + w * kLanes, sums[f][w], size(w));
}

// Weights (rows, kGroup) times scale as integers, those of a unit's rows side by side; adds them to total.
template <class Number>
inline void join_weights(const float* weights, int64_t rows, const Vec* scale, int32_t* joined, IntVec* total) {
  for (int64_t j = 0; j < rows; j += Number::kRows, joined += kGroup)
    for (int p = 0; p < kParts; ++p) {
      IntVec unit{};
      for (int64_t r = 0; r < Number::kRows && j + r < rows; ++r) {
        const IntVec w = (IntVec)rounded(load(weights + (j + r) * kGroup + p * kLanes, kLanes) * scale[p]);
        total[p] += w;
        unit |= (w & ((1u << Number::kBits) - 1)) << r * Number::kBits;
      }
      store_as(joined + p * kLanes, unit, kLanes);
    }
}

// The values of some rows for a strip, or for the `lanes` of it that there are. `next`: rows behind them.
template <class Number>
inline void join_values(const uint8_t* from, int64_t rows, int64_t next, int64_t stride, int64_t lanes, Integers* joined) {
  for (int64_t j = 0; j < rows; j += Number::kRows, joined += 4) {
    const uint8_t* taken[Number::kRows];
    uint8_t ends[Number::kRows][kStrip];  // of rows that end within the strip
    for (int r = 0; r < Number::kRows; ++r) {
      const int64_t row = std::min(j + r, rows - 1);  // what is not there weighs nothing
      taken[r] = from + row * stride;
      if (row < next) __builtin_prefetch(taken[r] + kRounded * stride, 0, 2);
      if (lanes < kStrip) taken[r] = static_cast<const uint8_t*>(std::memcpy(ends[r], taken[r], lanes));
    }
    Number::join(taken, joined);
  }
}

// y of some frames of an item, columns c to c + width, from rounded values of the past alone. Weights become integers of
// Number's, which are then taken for shares of what all of the past weighs.
template <class Number>
[[maybe_unused]] void sum_rounded(const EdgesepAttention& s, int64_t item, int64_t group, int64_t c, int64_t width) {
  constexpr int64_t kUnits = kRounded / Number::kRows;
  const int64_t count = std::min(kGroup, s.frames - group * kGroup);
  const float* weights = s.weights + (item * edgesep_attention_groups(&s) + group) * (s.past + s.frames) * kGroup;
  const uint8_t* past = static_cast<const uint8_t*>(s.past_v) + item * s.past * s.features + c;
  float* y = s.y + (item * s.frames + group * kGroup) * s.features + c;
  Vec most[kParts] = {}, shares[kParts] = {}, scale[kParts];
  for (int64_t j = 0; j < s.past; ++j)
    for (int p = 0; p < kParts; ++p) {
      const Vec w = load(weights + j * kGroup + p * kLanes, kLanes);
      most[p] = w > most[p] ? w : most[p];
      shares[p] += w;
    }
  for (int p = 0; p < kParts; ++p) {
    const Vec finest = splat(kFinest), fine = static_cast<float>(Number::kMost) / most[p];
    scale[p] = fine < finest ? fine : finest;
  }
  IntVec total[kParts] = {};  // unsigned: what NaN was rounded to may be anything
  for (int64_t j = 0; j < s.past; j += kRounded) {
    const int64_t rows = std::min(kRounded, s.past - j), units = (rows + Number::kRows - 1) / Number::kRows;
    int32_t joined_weights[kUnits * kGroup];
    join_weights<Number>(weights + j * kGroup, rows, scale, joined_weights, total);
    for (int64_t i = 0; i < width; i += kStrip) {
      const int64_t lanes = std::min(kStrip, width - i);
      Integers values[kUnits * 4];
      join_values<Number>(past + j * s.features + i, rows, s.past - j - kRounded, s.features, lanes, values);
      for (int64_t n = 0; n < count; n += kFrames)
        with_constant<kFrames>(std::min<int64_t>(kFrames, count - n), [&](auto frames) {
          constexpr int kCount = decltype(frames)::value;
          float* to = y + n * s.features + i;
          int64_t at = 0;
          for (; at + 2 * kLanes <= lanes; at += 2 * kLanes)
            add_rounded<Number, kCount, 2>(values + at / kLanes, joined_weights + n, units, j == 0, to + at, s.features,
                                           kLanes);
          for (; at < lanes; at += kLanes)
            add_rounded<Number, kCount, 1>(values + at / kLanes, joined_weights + n, units, j == 0, to + at, s.features,
                                           std::min<int64_t>(kLanes, lanes - at));
        });
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    const auto sum = static_cast<int32_t>(total[n / kLanes][n % kLanes]);
    const float back = sum ? s.v_scale * shares[n / kLanes][n % kLanes] / static_cast<float>(sum) : 0.0f;
    const float shift = (s.v_zero - Number::kZero) * static_cast<float>(sum);
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, width - i);
      float* at = y + n * s.features + i;
      store(at, (to_floats(load_as<Integers>(at, lanes)) - shift) * back, lanes);
    }
  }
}

}  // namespace

void attention_values(const EdgesepAttention* s, int64_t first, int64_t end) {
  const int64_t rows = s->past + s->frames, groups = edgesep_attention_groups(s), chunks = edgesep_attention_chunks(s);
  const int64_t size = (s->features + chunks * kGroup - 1) / (chunks * kGroup) * kGroup;
  std::vector<float> room(static_cast<size_t>(kIntegerProducts || s->v_scale == 0 ? 0 : kBlock * size));
  for (int64_t row = first; row < end; ++row) {
    const int64_t item = row / chunks, c = row % chunks * size, width = std::min(size, s->features - c);
    // Memory in its order: some rows of all columns of the chunk, then the next ones.
    int64_t j = 0;
    if constexpr (kIntegerProducts)
      if (s->v_scale != 0 && s->past) {
        for (int64_t g = 0; g < groups; ++g)
          sum_rounded<std::conditional_t<kByteProducts, Quads, Pairs>>(*s, item, g, c, width);
        j = s->past;
      }
    while (j < rows) {
      const bool own = j >= s->past;
      Rows r{};
      r.count = std::min(kBlock, (own ? rows : s->past) - j);
      r.stride = s->features;
      if (own) {
        r.values = s->v + (item * s->frames + j - s->past) * s->features + c;
      } else {
        const int64_t at = (item * s->past + j) * s->features + c;
        if (s->v_scale == 0) {
          r.values = static_cast<const float*>(s->past_v) + at;
          if (j + 2 * kBlock <= s->past) r.next = kBlock * s->features;
        } else {
          const uint8_t* past = static_cast<const uint8_t*>(s->past_v) + at;
          for (int64_t i = 0; i < r.count; ++i, past += s->features) {
            if (j + 2 * kBlock <= s->past)
              for (int64_t b = 0; b < width; b += 64) __builtin_prefetch(past + kBlock * s->features + b, 0, 2);
            widen(past, width, s->v_scale, s->v_zero, room.data() + i * width);
          }
          r.values = room.data();
          r.stride = width;
        }
      }
      r.features = s->features;
      r.first = j == 0;
      for (int64_t n = 0; n < s->frames;) {
        const int64_t within = n % kGroup, count = std::min({int64_t{kFrames}, s->frames - n, kGroup - within});
        r.weights = s->weights + ((item * groups + n / kGroup) * rows + j) * kGroup + within;
        r.y = s->y + (item * s->frames + n) * s->features + c;
        with_constant<kFrames>(count, [&](auto frames) { over_features<decltype(frames)::value>(r, width); });
        n += count;
      }
      j += r.count;
    }
  }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
