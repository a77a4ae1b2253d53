// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "conv_norm.h"

#include <algorithm>
#include <cmath>

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

void conv_norm(const EdgesepConvNorm* s, int64_t first, int64_t end) {
  const int64_t channels = s->channels;
  for (int64_t item = first; item < end; ++item) {
    const float* x = s->x + item * s->frames_in * channels;
    float* y = s->w ? s->y + item * s->frames * channels : nullptr;
    Total sums, squares;
    for (int64_t t = 0; t < s->frames; ++t) {
      Vec row_sum{}, row_squares{};
      const Taps taps(*s, t);
      over_channels(channels, [&](int64_t c, int64_t count) {
        Vec v{};
        if (!s->w) {
          v = load(x + t * channels + c, count);
        } else {
          if (s->bias) v = load(s->bias + c, count);
          for (int64_t k = taps.low; k < taps.high; ++k)
            v += load(s->w + k * channels + c, count) * load(x + (taps.at + k) * channels + c, count);
          store(y + t * channels + c, v, count);
        }
        row_sum += v;
        row_squares += v * v;
      });
      sums.add(row_sum);
      squares.add(row_squares);
    }
    const double n = static_cast<double>(s->frames * channels), mean = sums.value / n;
    const double variance = std::max(0.0, squares.value / n - mean * mean);
    const float rstd = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(s->eps)));
    s->stats[2 * item] = static_cast<float>(mean);
    s->stats[2 * item + 1] = rstd;
    const float* from = y ? y : x;
    float* out = s->out + item * s->frames * channels;
    for (int64_t t = 0; t < s->frames; ++t)
      over_channels(channels, [&](int64_t c, int64_t count) {
        const Vec normed = (load(from + t * channels + c, count) - s->stats[2 * item]) * rstd;
        Vec v = normed * load(s->gamma + c, count) + load(s->beta + c, count);
        if (s->slope) v = v > 0.0f ? v : v * *s->slope;
        store(out + t * channels + c, v, count);
      });
  }
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
