// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// Few frames meet many past ones: matrix products of runtimes would first copy the whole past into their own order, which
// takes longer than the sums. Here it is read once, as it lies. Scores stand with the frames of a call side by side in a
// register, so that no sum runs across lanes and softmax is a loop over registers.
#include "past_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int64_t kGroup = EDGESEP_ATTENTION_GROUP;  // frames side by side: the same on every instruction set
constexpr int kParts = static_cast<int>(kGroup) / kLanes;
constexpr int kRows = kParts == 1 ? 8 : 4;  // past frames at a time, as many as there are registers for
constexpr float kFinest = 8.3e6f;  // integers that add up to this stay below 2**31 when they weigh 255 each
constexpr float kNothing = -50.0f;  // what is hidden weighs nothing, not a denormal number, which processors are slow at
constexpr int64_t kBlock = 16;  // rows of values that are read together, and as many asked for before they are needed

// A plain loop: compilers widen registers of bytes better than what the vector types let one say.
inline void widen(const uint8_t* __restrict from, int64_t count, float scale, float zero, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<float>(from[i]) - zero) * scale;
}

inline void widen(const uint8_t* __restrict from, int64_t count, uint16_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// What scores are sums of products of: floats, or pairs of halves as in vec.h. Both are units of 32 bits.
struct Floats {
  using Sum = Vec;
  static Sum add(Sum sum, Vec query, Vec key) { return sum + query * key; }
};
struct Halves {
  using Sum = Integers;
  static Sum add(Sum sum, Vec query, Vec key) { return add_halves(sum, (Integers)query, (Integers)key); }
};

// A unit, or two of them, over and over.
template <int fold>
inline Vec repeated(const float* p) {
  using Unit = std::conditional_t<fold == 1, int32_t, int64_t>;
  typedef Unit Units __attribute__((vector_size(4 * kLanes)));
  Unit unit;
  std::memcpy(&unit, p, sizeof unit);
  return (Vec)(Units{} + unit);
}

// A group's queries: (count / fold, kGroup) units. Frame n has the lanes from fold n on: a call of few frames fills its
// registers with two units of each.
template <int fold>
struct Queries {
  int64_t count;  // units, a multiple of fold
  std::vector<float> units;
  float begin[kGroup] = {};  // what sums begin with

  explicit Queries(int64_t least)
      : count((least + fold - 1) / fold * fold), units(static_cast<size_t>(count / fold * kGroup)) {}

  float* at(int64_t frame, int64_t unit) {
    return units.data() + unit / fold * kGroup + fold * frame + unit % fold;
  }
};

template <int fold>
Queries<fold> as_floats(const float* q, int64_t count, int64_t size) {
  Queries<fold> made(size);
  for (int64_t n = 0; n < count; ++n)
    for (int64_t d = 0; d < size; ++d) *made.at(n, d) = q[n * size + d];
  return made;
}

// Halves are as large as they can be without a sum of 255 times as much beyond 2**31; back: what a sum counts for.
template <int fold>
Queries<fold> as_halves(const float* q, int64_t count, int64_t size, int32_t zero, float* back) {
  Queries<fold> made((size + 1) / 2);
  std::vector<int32_t> halves(static_cast<size_t>(2 * made.count + kLanes));
  for (int64_t n = 0; n < count; ++n, q += size) {
    const auto part = [&](int64_t d) { return load(q + d, std::min<int64_t>(kLanes, size - d)); };
    Vec most = splat(1e-30f), total = most;
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec v = magnitude(part(d));
      most = v > most ? v : most;
      total += v;
    }
    float largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    const float scale = std::min(32767.0f / largest, kFinest / sum(total));
    for (int64_t d = 0; d < size; d += kLanes) store_as(halves.data() + d, rounded(part(d) * scale), kLanes);
    int32_t begin[fold] = {};
    for (int64_t u = 0; u < made.count; ++u) {
      const int32_t one = halves[static_cast<size_t>(2 * u)], other = halves[static_cast<size_t>(2 * u + 1)];
      const uint32_t unit = (static_cast<uint32_t>(one) & 0xffff) | static_cast<uint32_t>(other) << 16;
      std::memcpy(made.at(n, u), &unit, sizeof unit);
      begin[u % fold] -= zero * (one + other);
    }
    std::memcpy(made.begin + fold * n, begin, sizeof begin);
    std::fill_n(back + fold * n, fold, 1 / scale);
  }
  return made;
}

// Sums of `rows` keys for some lanes of a group: (rows, kGroup). No more happens here, or they would not stay in
// registers.
template <class Number, int rows, int fold>
inline void score(const float* const* keys, const Queries<fold>& queries, int64_t lanes, float* to) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    typename Number::Sum sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = load_as<typename Number::Sum>(queries.begin + lane, kLanes);
    const float* query = queries.units.data() + lane;
    for (int64_t u = 0; u < queries.count; u += fold, query += kGroup) {
      const Vec q = load(query, kLanes);
      for (int r = 0; r < rows; ++r) sums[r] = Number::add(sums[r], q, repeated<fold>(keys[r] + u));
    }
    for (int r = 0; r < rows; ++r) store_as(to + r * kGroup + lane, sums[r], kLanes);
  }
}

bool all_zero(const float* p, int64_t count) {
  IntVec bits{};
  for (int64_t i = 0; i < count; i += kLanes)
    bits |= float_to_bits(load(p + i, std::min<int64_t>(kLanes, count - i)));
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= bits[i];
  return !any;
}

// What hides frames from those of a group, then exponentials and their sums' inverse, for all rows.
void soften(const EdgesepAttention& s, int64_t first, float* scores) {
  const int64_t rows = s.past + s.frames, count = std::min(kGroup, s.frames - first);
  for (int64_t n = 0; n < count; ++n) {
    const float* hidden = s.hidden + (first + n) * rows;
    // A stream that has run for a while sees all of its past.
    for (int64_t j = all_zero(hidden, s.past) ? s.past : 0; j < rows; ++j) scores[j * kGroup + n] += hidden[j];
  }
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    float* at = scores + lane;
    Vec most = splat(-std::numeric_limits<float>::infinity()), total{};
    for (int64_t j = 0; j < rows; ++j) {
      const Vec v = load(at + j * kGroup, kLanes);
      most = v > most ? v : most;
    }
    for (int64_t j = 0; j < rows; ++j) {
      const Vec below = load(at + j * kGroup, kLanes) - most, v = below < kNothing ? Vec{} : exp(below);
      total += v;
      store(at + j * kGroup, v, kLanes);
    }
    const Vec share = 1.0f / total;
    for (int64_t j = 0; j < rows; ++j) store(at + j * kGroup, load(at + j * kGroup, kLanes) * share, kLanes);
  }
}

// The weights of a group.
template <int fold>
void weigh(const EdgesepAttention& s, int64_t item, int64_t group) {
  const int64_t rows = s.past + s.frames, size = s.keys, count = std::min(kGroup, s.frames - group * kGroup);
  const int64_t row_bytes = size * (s.k_scale == 0 ? int64_t{sizeof(float)} : 1);
  const char* past = static_cast<const char*>(s.past_k) + item * s.past * row_bytes;
  const float *own = s.k + item * s.frames * size, *q = s.q + (item * s.frames + group * kGroup) * size;
  float* scores = s.weights + (item * edgesep_attention_groups(&s) + group) * rows * kGroup;
  const auto put = [&](int64_t j, int64_t lane, Vec sums) {
    float* to = scores + j * kGroup + lane;
    if constexpr (fold == 1) return store(to, sums, kLanes);
    float lanes[kLanes];
    store(lanes, sums, kLanes);
    for (int n = 0; n < kLanes / 2; ++n) to[n] = lanes[2 * n] + lanes[2 * n + 1], to[n + kLanes / 2] = 0;
  };
  // Keys from j to `stop`, which `key` puts into units.
  const auto over = [&](auto number, int64_t j, int64_t stop, const Queries<fold>& queries, auto key, auto value) {
    using Number = decltype(number);
    const auto some = [&](auto many) {
      const float* keys[many];
      for (int r = 0; r < many; ++r) keys[r] = key(j + r, r);
      float sums[many * kGroup];
      score<Number, many, fold>(keys, queries, fold * count, sums);
      for (int r = 0; r < many; ++r)
        for (int64_t lane = 0; lane < fold * count; lane += kLanes)
          put(j + r, lane, value(load_as<typename Number::Sum>(sums + r * kGroup + lane, kLanes), lane));
      j += many;
    };
    while (j + kRows <= stop) {
      if (j + 3 * kRows <= s.past)  // what comes after the next ones
        for (int64_t b = 0; b < kRows * row_bytes; b += 64)
          __builtin_prefetch(past + (j + 2 * kRows) * row_bytes + b, 0, 2);
      some(std::integral_constant<int, kRows>{});
    }
    while (j < stop) some(std::integral_constant<int, 1>{});
  };

  int64_t done = 0;
  if constexpr (kIntegerProducts)
    if (s.k_scale != 0) {
      float back[kGroup] = {};
      const Queries<fold> halves = as_halves<fold>(q, count, size, static_cast<int32_t>(s.k_zero), back);
      std::vector<uint16_t> room(static_cast<size_t>(kRows * 2 * halves.count));
      const auto key = [&](int64_t j, int r) {
        uint16_t* to = room.data() + r * 2 * halves.count;
        widen(reinterpret_cast<const uint8_t*>(past) + j * size, size, to);
        return reinterpret_cast<const float*>(to);
      };
      over(Halves{}, 0, s.past, halves, key, [&](Integers sums, int64_t lane) {
        return to_floats(sums) * s.k_scale * load(back + lane, kLanes);
      });
      done = s.past;
    }
  std::vector<float> room(static_cast<size_t>(kRows * size));
  const auto key = [&](int64_t j, int r) -> const float* {
    if (j >= s.past) return own + (j - s.past) * size;
    if (s.k_scale == 0) return reinterpret_cast<const float*>(past) + j * size;
    float* to = room.data() + r * size;
    widen(reinterpret_cast<const uint8_t*>(past) + j * size, size, s.k_scale, s.k_zero, to);
    return to;
  };
  over(Floats{}, done, rows, as_floats<fold>(q, count, size), key, [](Vec sums, int64_t) { return sums; });
  soften(s, group * kGroup, scores);
}

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
void sum_rounded(const EdgesepAttention& s, int64_t item, int64_t group, int64_t c, int64_t width) {
  const int64_t count = std::min(kGroup, s.frames - group * kGroup);
  const float* weights = s.weights + (item * edgesep_attention_groups(&s) + group) * (s.past + s.frames) * kGroup;
  float* y = s.y + (item * s.frames + group * kGroup) * s.features + c;
  Vec most{};
  for (int64_t j = 0; j < s.past; ++j) {
    const Vec w = load(weights + j * kGroup, kLanes);
    most = w > most ? w : most;
  }
  const Vec finest = splat(kFinest), fine = 32767.0f / most, scale = fine < finest ? fine : finest;
  const auto weight = [&](int64_t j) {
    return j < s.past ? rounded(load(weights + j * kGroup, kLanes) * scale) : Integers{};
  };
  Integers total{};
  for (int64_t j = 0; j < s.past; j += kBlock) {
    int32_t pairs[kBlock / 2 * kGroup];
    for (int64_t i = 0; i < kBlock; i += 2) {
      const Integers one = weight(j + i), other = weight(j + i + 1);
      total += one + other;
      store_as(pairs + i / 2 * kGroup, (one & 0xffff) | other << 16, kLanes);
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
    const float shift = s.v_zero * static_cast<float>(total[n]), back = s.v_scale / scale[n];
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, width - i);
      float* at = y + n * s.features + i;
      store(at, (to_floats(load_as<Integers>(at, lanes)) - shift) * back, lanes);
    }
  }
}

}  // namespace

void attention_weights(const EdgesepAttention* s, int64_t first, int64_t end) {
  const int64_t groups = edgesep_attention_groups(s);
  for (int64_t item = first; item < end; ++item)
    for (int64_t g = 0; g < groups; ++g) {
      const bool few = 2 * std::min(kGroup, s->frames - g * kGroup) <= kLanes && s->keys % 2 == 0;
      few ? weigh<2>(*s, item, g) : weigh<1>(*s, item, g);
    }
}

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
