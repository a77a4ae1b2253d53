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

// Some rows of rounded values, what pairs of them weigh, and where their sums go, as integers.
struct RoundedRows {
  const uint8_t* values;
  int64_t count, stride;
  const int32_t* weights;  // pairs of rows x kGroup, two halves each
  float* y;                // of the first frame: room for the sums
  int64_t features;
  bool first;
};

template <int frames, int width>
inline void combine(const RoundedRows& r, int64_t lanes) {
  const auto size = [&](int w) { return w == width - 1 ? lanes : int64_t{kLanes}; };
  Integers sums[frames][width] = {};
  if (!r.first)
    for (int f = 0; f < frames; ++f)
      for (int w = 0; w < width; ++w) sums[f][w] = load_as<Integers>(r.y + f * r.features + w * kLanes, size(w));
  const uint8_t* from = r.values;
  const int32_t* share = r.weights;
  for (int64_t j = 0; j < r.count; j += 2, from += 2 * r.stride, share += kGroup) {
    const uint8_t* other = j + 1 < r.count ? from + r.stride : from;  // which weighs nothing then
    for (int w = 0; w < width; ++w) {
      const Integers both = from_bytes(from + w * kLanes, size(w)) | from_bytes(other + w * kLanes, size(w)) << 16;
      for (int f = 0; f < frames; ++f) sums[f][w] = add_halves(sums[f][w], both, Integers{} + share[f]);
    }
  }
  for (int f = 0; f < frames; ++f)
    for (int w = 0; w < width; ++w) store_as(r.y + f * r.features + w * kLanes, sums[f][w], size(w));
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

// y of some frames of an item, columns c to c + width, from rounded values of the past alone. Weights become halves of
// words, as queries do.
[[maybe_unused]] void sum_rounded(const EdgesepAttention& s, int64_t item, int64_t group, int64_t c, int64_t width) {
  const int64_t count = std::min(kGroup, s.frames - group * kGroup);
  const float* weights = s.weights + (item * edgesep_attention_groups(&s) + group) * (s.past + s.frames) * kGroup;
  float* y = s.y + (item * s.frames + group * kGroup) * s.features + c;
  Vec most[kParts] = {}, scale[kParts];
  for (int64_t j = 0; j < s.past; ++j)
    for (int p = 0; p < kParts; ++p) {
      const Vec w = load(weights + j * kGroup + p * kLanes, kLanes);
      most[p] = w > most[p] ? w : most[p];
    }
  for (int p = 0; p < kParts; ++p) {
    const Vec finest = splat(kFinest), fine = 32767.0f / most[p];
    scale[p] = fine < finest ? fine : finest;
  }
  const auto weight = [&](int64_t j, int p) {
    return j < s.past ? (IntVec)rounded(load(weights + j * kGroup + p * kLanes, kLanes) * scale[p]) : IntVec{};
  };
  IntVec total[kParts] = {};  // unsigned: what NaN was rounded to may be anything
  for (int64_t j = 0; j < s.past; j += kBlock) {
    int32_t pairs[kBlock / 2 * kGroup];
    for (int64_t i = 0; i < kBlock; i += 2)
      for (int p = 0; p < kParts; ++p) {
        const IntVec one = weight(j + i, p), other = weight(j + i + 1, p);
        total[p] += one + other;
        store_as(pairs + i / 2 * kGroup + p * kLanes, (one & 0xffff) | other << 16, kLanes);
      }
    RoundedRows r{};
    r.count = std::min(kBlock, s.past - j);
    r.stride = r.features = s.features;
    r.values = static_cast<const uint8_t*>(s.past_v) + (item * s.past + j) * s.features + c;
    r.first = j == 0;
    if (j + 2 * kBlock <= s.past)
      for (int64_t i = kBlock; i < 2 * kBlock; ++i)
        for (int64_t b = 0; b < width; b += 64) __builtin_prefetch(r.values + i * s.features + b, 0, 2);
    for (int64_t n = 0; n < count; n += kFrames) {
      r.weights = pairs + n;
      r.y = y + n * s.features;
      with_constant<kFrames>(std::min<int64_t>(kFrames, count - n),
                             [&](auto frames) { over_features<decltype(frames)::value>(r, width); });
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    const auto sum = static_cast<int32_t>(total[n / kLanes][n % kLanes]);
    const float shift = s.v_zero * static_cast<float>(sum), back = s.v_scale / scale[n / kLanes][n % kLanes];
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
        for (int64_t g = 0; g < groups; ++g) sum_rounded(*s, item, g, c, width);
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
