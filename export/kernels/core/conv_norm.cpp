// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "conv_norm.h"

#include <algorithm>
#include <cmath>
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

// f(channel, how many lanes) for every register of channels.
template <typename F>
inline void over_channels(int64_t channels, F f) {
  int64_t channel = 0;
  for (; channel + kLanes <= channels; channel += kLanes) f(channel, int64_t{kLanes});
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

}  // namespace

namespace {

// One item's part: frames [begin, end) of the item.
struct Part {
  int64_t item, parts, number, begin, end;
  Part(const EdgesepConvNorm& s, int64_t row)
      : item(row / edgesep_conv_norm_parts(&s)),
        parts(edgesep_conv_norm_parts(&s)),
        number(row % parts),
        begin(s.frames * number / parts),
        end(s.frames * (number + 1) / parts) {}
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

// What an item's readers make of a map whose norm was left to them: act(scale x + offset), as vectors over channels.
class Read {
 public:
  template <typename S>
  Read(const S& s, int64_t item) : slope_(s.x_slope) {
    if (!s.x_stats) return;
    const float mean = s.x_stats[2 * item], rstd = s.x_stats[2 * item + 1];
    vectors_.resize(2, s.channels);
    scale_ = vectors_[0];
    offset_ = vectors_[1];
    for (int64_t c = 0; c < s.channels; ++c) {
      scale_[c] = s.x_gamma[c] * rstd;
      offset_[c] = s.x_beta[c] + ((s.x_bias ? s.x_bias[c] : 0) - mean) * scale_[c];
    }
  }
  explicit operator bool() const { return scale_; }
  Vec operator()(Vec x, int64_t c, int64_t count) const {
    const Vec v = x * load(scale_ + c, count) + load(offset_ + c, count);
    return slope_ ? (v > 0.0f ? v : v * *slope_) : v;
  }

 private:
  Vectors vectors_;
  float *scale_ = nullptr, *offset_ = nullptr;
  const float* slope_;
};

// The rows that a part reads, as they are or, where they change on the way, in a ring of as many as there are taps.
class Rows {
 public:
  Rows(const EdgesepConvNorm& s, int64_t item)
      : s_(s), read_(s, item), x_(s.x + item * s.frames_in * s.channels), shift_(s.x_shift) {
    if (shift_) shift_ += item * s.x_coarse * s.channels;
    if (read_ || shift_) ring_.resize(s.taps, s.channels);
  }
  // Rows are asked for in rising order, each window no longer than the ring.
  const float* operator()(int64_t i) {
    if (!ring_) return x_ + i * s_.channels;
    float* row = ring_[i % s_.taps];
    if (i <= last_) return row;
    last_ = i;
    const float* from = x_ + i * s_.channels;
    const float* add = shift_ ? shift_ + (s_.x_index ? s_.x_index[i] : i) * s_.channels : nullptr;
    over_channels(s_.channels, [&](int64_t c, int64_t count) {
      Vec v = load(from + c, count);
      if (read_) v = read_(v, c, count);
      if (add) v += load(add + c, count);
      store(row + c, v, count);
    });
    return row;
  }

 private:
  const EdgesepConvNorm& s_;
  const Read read_;
  const float *x_, *shift_;
  Vectors ring_;
  int64_t last_ = -1;
};

// Calls f(channel, count, y) for every register of frame t before the norm. kTaps: 0 without a convolution.
template <int kTaps, typename F>
inline void convolved(const EdgesepConvNorm& s, Rows& rows, int64_t t, F f) {
  const int64_t channels = s.channels;
  if constexpr (!kTaps) {
    const float* x = rows(t);
    over_channels(channels, [&](int64_t c, int64_t count) {
      Vec v = load(x + c, count);
      if (s.bias) v += load(s.bias + c, count);
      f(c, count, v);
    });
  } else {
    const Taps taps(s, t);
    const float* x[kTaps];
    for (int64_t k = taps.low; k < taps.high; ++k) x[k] = rows(taps.at + k);
    if (taps.high - taps.low == kTaps) {  // not at an edge: the compiler knows how many
      over_channels(channels, [&](int64_t c, int64_t count) {
        Vec v = s.bias ? load(s.bias + c, count) : Vec{};
        for (int k = 0; k < kTaps; ++k) v += load(s.w + k * channels + c, count) * load(x[k] + c, count);
        f(c, count, v);
      });
    } else {
      over_channels(channels, [&](int64_t c, int64_t count) {
        Vec v = s.bias ? load(s.bias + c, count) : Vec{};
        for (int64_t k = taps.low; k < taps.high; ++k)
          v += load(s.w + k * channels + c, count) * load(x[k] + c, count);
        f(c, count, v);
      });
    }
  }
}

// Whether y is something else than x and has to be written before it is normalized.
bool changed(const EdgesepConvNorm& s) { return s.w || s.bias || s.x_stats || s.x_shift; }

template <int kTaps>
void sums_of(const EdgesepConvNorm& s, int64_t row) {
  const Part part(s, row);
  const int64_t channels = s.channels;
  float* y = changed(s) && s.y ? s.y + part.item * s.frames * channels : nullptr;
  Rows rows(s, part.item);
  Total sums, squares;
  for (int64_t t = part.begin; t < part.end; ++t) {
    Vec row_sum{}, row_squares{};
    convolved<kTaps>(s, rows, t, [&](int64_t c, int64_t count, Vec v) {
      if (y) store(y + t * channels + c, v, count);
      row_sum += v;
      row_squares += v * v;
    });
    sums.add(row_sum);
    squares.add(row_squares);
  }
  s.sums[2 * row] = sums.value;
  s.sums[2 * row + 1] = squares.value;
}

struct Stats {
  float mean, rstd;
  Stats(const EdgesepConvNorm& s, const Part& part) {
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < part.parts; ++k) {
      sum += s.sums[2 * (part.item * part.parts + k)];
      squares += s.sums[2 * (part.item * part.parts + k) + 1];
    }
    const double n = static_cast<double>(s.frames * s.channels), centre = sum / n;
    const double variance = std::max(0.0, squares / n - centre * centre);
    mean = static_cast<float>(centre);
    rstd = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(s.eps)));
    if (s.stats && !part.number) {
      s.stats[2 * part.item] = mean;
      s.stats[2 * part.item + 1] = rstd;
    }
  }
};

template <int kTaps>
void apply_to(const EdgesepConvNorm& s, int64_t row) {
  const Part part(s, row);
  const int64_t channels = s.channels, coarse = part.item * s.coarse * channels;
  float* out = s.out + part.item * s.frames * channels;
  const auto finish = [&](int64_t t, int64_t c, int64_t count, Vec v) {
    if (s.sigmoid)
      v = sigmoid(v);
    else if (s.slope)
      v = v > 0.0f ? v : v * *s.slope;
    const int64_t at = coarse + (s.index ? s.index[t] : t) * channels + c;
    if (s.gate) v *= load(s.gate + at, count);
    if (s.shift) v += load(s.shift + at, count);
    store(out + t * channels + c, v, count);
  };
  if (!s.gamma) {
    Rows rows(s, part.item);
    for (int64_t t = part.begin; t < part.end; ++t)
      convolved<kTaps>(s, rows, t, [&](int64_t c, int64_t count, Vec v) { finish(t, c, count, v); });
    return;
  }
  const Stats stats(s, part);
  const float* from = changed(s) ? s.y + part.item * s.frames * channels : s.x + part.item * s.frames * channels;
  for (int64_t t = part.begin; t < part.end; ++t)
    over_channels(channels, [&](int64_t c, int64_t count) {
      const Vec v = (load(from + t * channels + c, count) - stats.mean) * stats.rstd;
      finish(t, c, count, v * load(s.gamma + c, count) + load(s.beta + c, count));
    });
}

template <int kTaps>
void over_rows(const EdgesepConvNorm* s, int64_t first, int64_t end, bool apply) {
  for (int64_t row = first; row < end; ++row) apply ? apply_to<kTaps>(*s, row) : sums_of<kTaps>(*s, row);
}

void over_rows(const EdgesepConvNorm* s, int64_t first, int64_t end, bool apply) {
  if (!s->w) return over_rows<0>(s, first, end, apply);
  if (s->taps == 1) return over_rows<1>(s, first, end, apply);
  if (s->taps == 3) return over_rows<3>(s, first, end, apply);
  if (s->taps == 5) return over_rows<5>(s, first, end, apply);
  over_rows<7>(s, first, end, apply);
}

}  // namespace

void conv_norm_sums(const EdgesepConvNorm* s, int64_t first, int64_t end) { over_rows(s, first, end, false); }

void conv_norm_apply(const EdgesepConvNorm* s, int64_t first, int64_t end) {
  if (s->gamma || !s->stats) return over_rows(s, first, end, true);
  for (int64_t row = first; row < end; ++row) Stats(*s, Part(*s, row));  // the norm is left to the readers
}

void conv_norm_backward(const EdgesepConvNormBackward* s, int64_t first, int64_t end) {
  const int64_t channels = s->channels;
  for (int64_t item = first; item < end; ++item) {
    const float *y = s->y + item * s->frames * channels, *dout = s->dout + item * s->frames * channels;
    const Norm norm{s->stats[2 * item], s->stats[2 * item + 1], s->gamma, s->beta, s->slope};
    Total shifts, tilts, slope;
    for (int64_t t = 0; t < s->frames; ++t) {
      Vec row_shift{}, row_tilt{}, row_slope{};
      over_channels(channels, [&](int64_t c, int64_t count) {
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
      over_channels(channels, [&](int64_t c, int64_t count) {
        const Vec normed = norm.centred(load(y + t * channels + c, count));
        const Vec g = norm.through(load(dout + t * channels + c, count), normed, c, count);
        store(dy + t * channels + c, (g * load(s->gamma + c, count) - shift - normed * tilt) * norm.rstd, count);
      });
    if (!s->w) continue;
    const float* x = s->x + item * s->frames_in * channels;
    for (int64_t t = 0; t < s->frames; ++t) {
      const Taps taps(*s, t);
      over_channels(channels, [&](int64_t c, int64_t count) {
        const Vec g = load(dy + t * channels + c, count);
        for (int64_t k = taps.low; k < taps.high; ++k)
          add_to(s->dw + k * channels + c, g * load(x + (taps.at + k) * channels + c, count), count);
        if (s->dbias) add_to(s->dbias + c, g, count);
      });
    }
    for (int64_t i = 0; i < s->frames_in; ++i)
      over_channels(channels, [&](int64_t c, int64_t count) {
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
    const Read read(*s, row / s->coarse);
    over_channels(s->channels, [&](int64_t c, int64_t count) {
      Vec v = load(s->total + row * s->channels + c, count);
      for (int64_t k = 0; k < span; ++k) {
        const Vec u = load(x + index[k] * s->channels + c, count);
        v += (read ? read(u, c, count) : u) * weight[k];
      }
      store(s->out + row * s->channels + c, v, count);
    });
  }
}

void gated(const EdgesepGated* s, int64_t first, int64_t end) {
  for (int64_t item = first; item < end; ++item)
    for (int64_t t = 0; t < s->frames; ++t) {
      const int64_t at = (item * s->frames + t) * s->channels, from = (item * s->coarse + s->index[t]) * s->channels;
      over_channels(s->channels, [&](int64_t c, int64_t count) {
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
      over_channels(s->channels, [&](int64_t c, int64_t count) {
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
