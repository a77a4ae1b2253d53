// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "conv_norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

// Loops run over frames outside and channels inside: memory is then read in its order.

// Sums of a great many floats: lanes are emptied into doubles after every frame.
struct Total {
  double value = 0;
  void add(Vec v) { value += static_cast<double>(sum(v)); }
};

// f(channel, how many lanes) for every register of channels. The number of a full one is a type: it stays a constant
// where f is too large to be put in line twice.
template <typename F>
inline void over_channels(int64_t channels, F f) {
  int64_t channel = 0;
  for (; channel + kLanes <= channels; channel += kLanes) f(channel, std::integral_constant<int64_t, kLanes>{});
  if (channel < channels) f(channel, channels - channel);
}

inline void add_to(float* p, Vec v, int64_t count) { store(p, load(p, count) + v, count); }

// The taps of frame t that meet the input: k in [low, high), at input frame t stride - taps / 2 + k.
struct Taps {
  int64_t at, low, high;
  template <typename S>
  Taps(const S& s, int64_t t)
      : at(t * s.stride - s.taps / 2), low(std::max<int64_t>(0, -at)), high(std::min(s.taps, s.frames_in - at)) {}
};

struct Norm {
  float mean, rstd;
  const float *gamma, *beta, *slope;

  Vec centred(Vec y) const { return (y - mean) * rstd; }
  // The gradient that passes the activation.
  Vec through(Vec dout, Vec normed, int64_t channel, int64_t count) const {
    if (!slope) return dout;
    const Vec before = load(gamma + channel, count) * normed + load(beta + channel, count);
    return before > 0.0f ? dout : dout * *slope;
  }
};

// Frames that are computed together: each row of the input is read once for all of them, into as many registers.
constexpr int kTile = kRegisters / 4;
constexpr int64_t kWhole = 8;  // parts are so many frames, or a multiple: the same on every instruction set

// One item's part: frames [begin, end) of the item.
struct Part {
  int64_t item, parts, number, begin, end;
  Part(const EdgesepConvNorm& s, int64_t row)
      : item(row / edgesep_conv_norm_parts(&s)),
        parts(edgesep_conv_norm_parts(&s)),
        number(row % parts),
        begin(bound(s, number)),
        end(bound(s, number + 1)) {}

 private:
  int64_t bound(const EdgesepConvNorm& s, int64_t k) const {
    return std::min(s.frames, (s.frames * k / parts + kWhole - 1) / kWhole * kWhole);
  }
};

// Vectors over channels that no two registers of which share a line of the cache with others, and whose distance is no
// power of two: rows 2 KiB apart would push each other out of it.
class Vectors {
 public:
  void resize(int64_t count, int64_t channels) {
    stride_ = (channels + kLine - 1) / kLine * kLine + kLine;
    memory_.resize(static_cast<size_t>(count * stride_ + kLine));
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.data()), bytes = kLine * sizeof(float);
    first_ = memory_.data() + ((at + bytes - 1) / bytes * bytes - at) / sizeof(float);
  }
  explicit operator bool() const { return first_; }
  float* operator[](int64_t i) const { return first_ + i * stride_; }

 private:
  static constexpr int64_t kLine = 16;
  std::vector<float> memory_;
  float* first_ = nullptr;
  int64_t stride_ = 0;
};

// scale x + offset, vectors over channels; none where there is no norm.
class Affine {
 public:
  Affine(const float* gamma, const float* beta, const float* bias, float mean, float rstd, int64_t channels) {
    vectors_.resize(2, channels);
    scale_ = vectors_[0];
    offset_ = vectors_[1];
    for (int64_t c = 0; c < channels; ++c) {
      scale_[c] = gamma[c] * rstd;
      offset_[c] = beta[c] + ((bias ? bias[c] : 0) - mean) * scale_[c];
    }
  }
  Affine() = default;
  explicit operator bool() const { return scale_; }
  Vec scale(int64_t c, int64_t count) const { return load(scale_ + c, count); }
  Vec offset(int64_t c, int64_t count) const { return load(offset_ + c, count); }
  Vec operator()(Vec x, int64_t c, int64_t count) const { return x * scale(c, count) + offset(c, count); }

 private:
  Vectors vectors_;
  float *scale_ = nullptr, *offset_ = nullptr;
};

inline float slope_of(const float* slope) { return slope ? *slope : 1.0f; }
inline Vec leaky(Vec v, float slope) { return v > 0.0f ? v : v * slope; }

// What an item's readers make of a map whose norm was left to them.
template <typename S>
Affine left_to_readers(const S& s, int64_t item) {
  if (!s.x_stats) return {};
  return {s.x_gamma, s.x_beta, s.x_bias, s.x_stats[2 * item], s.x_stats[2 * item + 1], s.channels};
}

// How rows change where they are read. Told apart when compiled: the pointers of a tile's rows need all registers.
enum class How { kAsTheyAre, kNormed, kShifted };  // shifted: and normed, perhaps

// The rows that an item's unit reads.
class Source {
 public:
  Source(const EdgesepConvNorm& s, int64_t item)
      : how(s.x_shift ? How::kShifted : s.x_stats ? How::kNormed : How::kAsTheyAre),
        frames(s.frames_in),
        channels(s.channels),
        norm_(left_to_readers(s, item)),
        x_(s.x + item * s.frames_in * s.channels),
        shift_(s.x_shift ? s.x_shift + item * s.x_coarse * s.channels : nullptr),
        index_(s.x_index),
        slope_(slope_of(s.x_slope)) {}

  const How how;
  const int64_t frames, channels;

  const float* row(int64_t i) const { return x_ + i * channels; }
  const float* shift(int64_t i) const { return shift_ + (index_ ? index_[i] : i) * channels; }
  template <How kHow>
  Vec read(const float* row, const float* shift, int64_t c, int64_t count) const {
    const Vec v = load(row + c, count);
    if constexpr (kHow == How::kAsTheyAre) return v;
    const Vec u = norm_ ? leaky(norm_(v, c, count), slope_) : v;
    return kHow == How::kShifted ? u + load(shift + c, count) : u;
  }

 private:
  const Affine norm_;
  const float *x_, *shift_;
  const int64_t* index_;
  const float slope_;
};

// Calls f(channel, count, y) with kFrames registers of channels, those of frames [t, t + kFrames) before the norm. All
// rows that these meet must be the map's.
template <int kTaps, int kStride, int kFrames, How kHow>
struct Tile {
  static constexpr int kSize = kFrames;

  template <typename F>
  static void each(const EdgesepConvNorm& s, const Source& source, int64_t t, F f) {
    constexpr int kRows = (kFrames - 1) * kStride + kTaps, kNext = kFrames * kStride;
    const int64_t at = t * kStride - kTaps / 2, channels = s.channels;
    const float *w = s.w, *bias = s.bias, *x = source.row(at), *shift[kRows];
    if constexpr (kHow == How::kShifted)
      for (int r = 0; r < kRows; ++r) shift[r] = source.shift(at + r);
    over_channels(channels, [&](int64_t c, auto count) {
      Vec weight[kTaps], y[kFrames];
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) weight[k] = w ? load(w + k * channels + c, count) : splat(1.0f);
#pragma GCC unroll 8
      for (int i = 0; i < kFrames; ++i) y[i] = bias ? load(bias + c, count) : Vec{};
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const float* row = x + r * channels;
        // Rows are far apart and each is read a line at a time: too many for the processor to see what comes next.
        if (kFrames > 1 && r >= kRows - kNext) __builtin_prefetch(row + kNext * channels + c, 0, 2);
        const Vec u = source.read<kHow>(row, kHow == How::kShifted ? shift[r] : nullptr, c, count);
#pragma GCC unroll 8
        for (int i = 0; i < kFrames; ++i)
          if (r >= i * kStride && r < i * kStride + kTaps) y[i] += weight[r - i * kStride] * u;
      }
      f(c, count, y);
    });
  }
};

// The same for one frame of any unit, at an end of the map too.
struct AnyTile {
  static constexpr int kSize = 1;

  template <typename F>
  static void each(const EdgesepConvNorm& s, const Source& source, int64_t t, F f) {
    const Taps taps(s, t);
    const float *x[EDGESEP_NORM_MAX_TAPS], *shift[EDGESEP_NORM_MAX_TAPS];
    for (int64_t k = taps.low; k < taps.high; ++k) {
      x[k] = source.row(taps.at + k);
      shift[k] = source.how == How::kShifted ? source.shift(taps.at + k) : nullptr;
    }
    over_channels(s.channels, [&](int64_t c, auto count) {
      Vec y[1] = {s.bias ? load(s.bias + c, count) : Vec{}};
      for (int64_t k = taps.low; k < taps.high; ++k) {
        const Vec weight = s.w ? load(s.w + k * s.channels + c, count) : splat(1.0f);
        y[0] += weight * (shift[k] ? source.read<How::kShifted>(x[k], shift[k], c, count)
                                   : source.read<How::kNormed>(x[k], nullptr, c, count));
      }
      f(c, count, y);
    });
  }
};

struct Sums {
  Total plain, squares;
};

// The sums of `count` frames from t on, which are written to y unless that is null.
template <typename T>
void sum_tile(const EdgesepConvNorm& s, const Source& source, int64_t t, int64_t frames, float* y, Sums& sums) {
  Vec plain{}, squares{};
  const int64_t channels = s.channels, end = t + frames;
  for (; t < end; t += T::kSize)
    T::each(s, source, t, [&](int64_t c, auto count, const Vec(&of)[T::kSize]) {
      Vec row{}, row_squares{};
#pragma GCC unroll 8
      for (int i = 0; i < T::kSize; ++i) {
        if (t + i >= end) continue;
        if (y) store(y + (t + i) * channels + c, of[i], count);
        row += of[i];
        row_squares += of[i] * of[i];
      }
      plain += row;
      squares += row_squares;
    });
  sums.plain.add(plain);
  sums.squares.add(squares);
}

// Where a tile's frames go, and the gates and shifts that they meet, or null.
struct Joined {
  float* out[kTile];
  const float *gate[kTile], *shift[kTile];
};

template <typename T>
void apply_tile(const EdgesepConvNorm& s, const Source& source, const Affine& norm, int64_t t, int64_t frames,
                const Joined& to) {
  // Copies: the compiler must take it that a store changes what it is given by reference.
  const Joined at = to;
  const bool normed = static_cast<bool>(norm), to_sigmoid = s.sigmoid, gated = at.gate[0], shifted = at.shift[0];
  const float slope = slope_of(s.slope);
  for (int64_t first = 0; first < frames; first += T::kSize)
    T::each(s, source, t + first, [&](int64_t c, auto count, const Vec(&of)[T::kSize]) {
      const Vec scale = normed ? norm.scale(c, count) : splat(1.0f), offset = normed ? norm.offset(c, count) : Vec{};
#pragma GCC unroll 8
      for (int i = 0; i < T::kSize; ++i) {
        if (first + i >= frames) continue;
        Vec v = of[i] * scale + offset;
        v = to_sigmoid ? sigmoid(v) : leaky(v, slope);
        if (gated) v *= load(at.gate[first + i] + c, count);
        if (shifted) v += load(at.shift[first + i] + c, count);
        store(at.out[first + i] + c, v, count);
      }
    });
}

// A unit's tiles: those whose rows are all the map's, and those at its ends. Only what U-Conv separators are made of
// has tiles of its own.
struct Tiles {
  using Sum = void (*)(const EdgesepConvNorm&, const Source&, int64_t, int64_t, float*, Sums&);
  using Apply = void (*)(const EdgesepConvNorm&, const Source&, const Affine&, int64_t, int64_t, const Joined&);
  Sum sum[2];
  Apply apply[2];

  Tiles(const EdgesepConvNorm& s, How how)
      : sum{sum_tile<AnyTile>, sum_tile<AnyTile>}, apply{apply_tile<AnyTile>, apply_tile<AnyTile>} {
    const bool plain = how == How::kAsTheyAre, normed = how == How::kNormed;
    if (s.stride == 1 && s.taps == 1) {
      sum[0] = plain ? sum_tile<Pointwise<How::kAsTheyAre>>
                     : normed ? sum_tile<Pointwise<How::kNormed>> : sum_tile<Pointwise<How::kShifted>>;
      apply[0] = plain ? apply_tile<Pointwise<How::kAsTheyAre>>
                       : normed ? apply_tile<Pointwise<How::kNormed>> : apply_tile<Pointwise<How::kShifted>>;
    } else if (s.stride == 1 && s.taps == 5) {
      sum[0] = plain ? sum_tile<Five<How::kAsTheyAre>>
                     : normed ? sum_tile<Five<How::kNormed>> : sum_tile<Five<How::kShifted>>;
      if (plain) apply[0] = apply_tile<Five<How::kAsTheyAre>>;
    } else if (s.stride == 2 && s.taps == 5 && normed) {
      sum[0] = sum_tile<Strided>;
    }
  }
  // Whether frames [t, t + kTile) meet rows beyond the map.
  static int at_end(const EdgesepConvNorm& s, int64_t t) {
    const int64_t first = t * s.stride - s.taps / 2, last = first + (kTile - 1) * s.stride + s.taps - 1;
    return first < 0 || last >= s.frames_in;
  }

 private:
  template <How kHow>
  using Pointwise = Tile<1, 1, 1, kHow>;  // reads no row twice
  template <How kHow>
  using Five = Tile<5, 1, kTile, kHow>;
  using Strided = Tile<5, 2, kTile / 2, How::kNormed>;  // more rows at a time are worse for the cache
};

// Whether y is something else than x.
bool changed(const EdgesepConvNorm& s) { return s.w || s.bias || s.x_stats || s.x_shift; }

void sums_of(const EdgesepConvNorm& s, int64_t row) {
  const Part part(s, row);
  const Source source(s, part.item);
  const Tiles tiles(s, source.how);
  float* y = changed(s) && s.y ? s.y + part.item * s.frames * s.channels : nullptr;
  Sums sums;
  for (int64_t t = part.begin; t < part.end; t += kTile)
    tiles.sum[Tiles::at_end(s, t)](s, source, t, std::min<int64_t>(kTile, part.end - t), y, sums);
  s.sums[2 * row] = sums.plain.value;
  s.sums[2 * row + 1] = sums.squares.value;
}

struct Stats {
  float mean, rstd;
  Stats(const EdgesepConvNorm& s, int64_t item) {
    const int64_t parts = edgesep_conv_norm_parts(&s);
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < parts; ++k) {
      sum += s.sums[2 * (item * parts + k)];
      squares += s.sums[2 * (item * parts + k) + 1];
    }
    const double n = static_cast<double>(s.frames * s.channels), centre = sum / n;
    const double variance = std::max(0.0, squares / n - centre * centre);
    mean = static_cast<float>(centre);
    rstd = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(s.eps)));
  }
};

void apply_to(const EdgesepConvNorm& s, int64_t row) {
  const Part part(s, row);
  Affine norm;
  if (s.gamma || s.stats) {
    const Stats stats(s, part.item);
    if (s.stats && !part.number) {
      s.stats[2 * part.item] = stats.mean;
      s.stats[2 * part.item + 1] = stats.rstd;
    }
    if (!s.gamma) return;  // the norm is left to the readers
    norm = {s.gamma, s.beta, nullptr, stats.mean, stats.rstd, s.channels};
  }
  const Source source(s, part.item);
  const Tiles tiles(s, source.how);
  const int64_t channels = s.channels, coarse = part.item * s.coarse * channels;
  for (int64_t t = part.begin; t < part.end; t += kTile) {
    const int64_t frames = std::min<int64_t>(kTile, part.end - t);
    Joined to{};
    for (int64_t i = 0; i < frames; ++i) {
      const int64_t at = coarse + (s.index ? s.index[t + i] : t + i) * channels;
      to.out[i] = s.out + (part.item * s.frames + t + i) * channels;
      to.gate[i] = s.gate ? s.gate + at : nullptr;
      to.shift[i] = s.shift ? s.shift + at : nullptr;
    }
    tiles.apply[Tiles::at_end(s, t)](s, source, norm, t, frames, to);
  }
}

}  // namespace

void conv_norm_sums(const EdgesepConvNorm* s, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) sums_of(*s, row);
}

void conv_norm_apply(const EdgesepConvNorm* s, int64_t first, int64_t end) {
  EdgesepConvNorm written = *s;
  if (s->gamma && s->y && changed(*s)) {  // the first pass has written what is normalized
    written.x = s->y, written.frames_in = s->frames, written.taps = written.stride = 1;
    written.w = written.bias = written.x_stats = written.x_shift = nullptr;
  }
  for (int64_t row = first; row < end; ++row) apply_to(written, row);
}

void conv_norm_backward(const EdgesepConvNormBackward* s, int64_t first, int64_t end) {
  const int64_t channels = s->channels;
  for (int64_t item = first; item < end; ++item) {
    const float *y = s->y + item * s->frames * channels, *dout = s->dout + item * s->frames * channels;
    const Norm norm{s->stats[2 * item], s->stats[2 * item + 1], s->gamma, s->beta, s->slope};
    Total shifts, tilts, slope;
    for (int64_t t = 0; t < s->frames; ++t) {
      Vec row_shift{}, row_tilt{}, row_slope{};
      over_channels(channels, [&](int64_t c, auto count) {
        const Vec normed = norm.centred(load(y + t * channels + c, count)), d = load(dout + t * channels + c, count);
        const Vec g = norm.through(d, normed, c, count), gamma = load(s->gamma + c, count);
        add_to(s->dgamma + c, g * normed, count);
        add_to(s->dbeta + c, g, count);
        row_shift += g * gamma;
        row_tilt += g * gamma * normed;
        if (s->slope) {
          const Vec before = gamma * normed + load(s->beta + c, count);
          row_slope += before > 0.0f ? Vec{} : d * before;
        }
      });
      shifts.add(row_shift);
      tilts.add(row_tilt);
      if (s->slope) slope.add(row_slope);
    }
    if (s->slope) *s->dslope += static_cast<float>(slope.value);
    const double n = static_cast<double>(s->frames * channels);
    const float shift = static_cast<float>(shifts.value / n), tilt = static_cast<float>(tilts.value / n);
    float* dx = s->dx + item * s->frames_in * channels;
    float* dy = s->w ? s->workspace : dx;
    for (int64_t t = 0; t < s->frames; ++t)
      over_channels(channels, [&](int64_t c, auto count) {
        const Vec normed = norm.centred(load(y + t * channels + c, count));
        const Vec g = norm.through(load(dout + t * channels + c, count), normed, c, count);
        store(dy + t * channels + c, (g * load(s->gamma + c, count) - shift - normed * tilt) * norm.rstd, count);
      });
    if (!s->w) continue;
    const float* x = s->x + item * s->frames_in * channels;
    for (int64_t t = 0; t < s->frames; ++t) {
      const Taps taps(*s, t);
      over_channels(channels, [&](int64_t c, auto count) {
        const Vec g = load(dy + t * channels + c, count);
        for (int64_t k = taps.low; k < taps.high; ++k)
          add_to(s->dw + k * channels + c, g * load(x + (taps.at + k) * channels + c, count), count);
        if (s->dbias) add_to(s->dbias + c, g, count);
      });
    }
    for (int64_t i = 0; i < s->frames_in; ++i)
      over_channels(channels, [&](int64_t c, auto count) {
        Vec g{};  // of the frames t with t stride - taps / 2 + k = i
        for (int64_t k = 0; k < s->taps; ++k) {
          const int64_t at = i + s->taps / 2 - k;
          if (at >= 0 && at % s->stride == 0 && at / s->stride < s->frames)
            g += load(dy + at / s->stride * channels + c, count) * load(s->w + k * channels + c, count);
        }
        store(dx + i * channels + c, g, count);
      });
  }
}

void pooled(const EdgesepPooled* s, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    const int64_t j = row % s->coarse, span = s->span;
    const float *x = s->x + row / s->coarse * s->frames * s->channels, *weight = s->weight + j * span;
    const int64_t* index = s->index + j * span;
    const Affine norm = left_to_readers(*s, row / s->coarse);
    const float slope = slope_of(s->x_slope);
    over_channels(s->channels, [&](int64_t c, auto count) {
      Vec v = load(s->total + row * s->channels + c, count);
      for (int64_t k = 0; k < span; ++k) {
        const Vec u = load(x + index[k] * s->channels + c, count);
        v += (norm ? leaky(norm(u, c, count), slope) : u) * weight[k];
      }
      store(s->out + row * s->channels + c, v, count);
    });
  }
}

void gated(const EdgesepGated* s, int64_t first, int64_t end) {
  for (int64_t item = first; item < end; ++item)
    for (int64_t t = 0; t < s->frames; ++t) {
      const int64_t at = (item * s->frames + t) * s->channels, from = (item * s->coarse + s->index[t]) * s->channels;
      over_channels(s->channels, [&](int64_t c, auto count) {
        const Vec gate = sigmoid(load(s->gate + from + c, count));
        store(s->out + at + c, load(s->local + at + c, count) * gate + load(s->shift + from + c, count), count);
      });
    }
}

void gated_backward(const EdgesepGatedBackward* s, int64_t first, int64_t end) {
  for (int64_t item = first; item < end; ++item) {
    const int64_t base = item * s->coarse * s->channels;
    std::fill(s->dgate + base, s->dgate + base + s->coarse * s->channels, 0.0f);
    std::fill(s->dshift + base, s->dshift + base + s->coarse * s->channels, 0.0f);
    for (int64_t t = 0; t < s->frames; ++t) {
      const int64_t at = (item * s->frames + t) * s->channels, from = base + s->index[t] * s->channels;
      over_channels(s->channels, [&](int64_t c, auto count) {
        const Vec gate = sigmoid(load(s->gate + from + c, count)), g = load(s->dout + at + c, count);
        store(s->dlocal + at + c, g * gate, count);
        add_to(s->dgate + from + c, g * load(s->local + at + c, count) * gate * (1.0f - gate), count);
        add_to(s->dshift + from + c, g, count);
      });
    }
  }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
