// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "causal_conv.h"

#include <algorithm>

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kMaxTaps = EDGESEP_CONV_MAX_TAPS;

void load_taps(const float* w, int64_t channels, int64_t taps, Vec* out) {
  float lanes[kLanes];
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t c = 0; c < kLanes; ++c) lanes[c] = c < channels ? w[c * taps + k] : 0;
    out[k] = load(lanes, kLanes);
  }
}

// One batch item, one register of channels; the last inputs stay in registers.
template <int kTaps, int kCount, bool kRough = false>
void row(const EdgesepConv& s, int64_t item, int64_t channel) {
  const int64_t taps = kTaps ? kTaps : s.taps;
  const int64_t count = kCount ? kCount : std::min<int64_t>(kLanes, s.channels - channel);
  Vec w[kMaxTaps], past[kMaxTaps] = {};
  load_taps(s.w + channel * taps, count, taps, w);
  const Vec bias = s.bias ? load(s.bias + channel, count) : Vec{};
  for (int64_t step = 0; step < s.length; ++step) {
    const int64_t at = (item * s.length + (s.reverse ? s.length - 1 - step : step)) * s.channels + channel;
    for (int64_t k = 0; k + 1 < taps; ++k) past[k] = past[k + 1];
    past[taps - 1] = load(s.x + at, count);
    Vec y = bias;
    for (int64_t k = 0; k < taps; ++k) y += w[k] * past[k];
    store(s.y + at, silu<kRough>(y), count);
  }
}

}  // namespace

void conv(const EdgesepConv* s, int64_t first, int64_t end) {
  const int64_t blocks = (s->channels + kRowChannels - 1) / kRowChannels;
  for (int64_t r = first; r < end; ++r) {
    const int64_t item = r / blocks, from = r % blocks * kRowChannels;
    for (int64_t channel = from; channel < std::min(from + kRowChannels, s->channels); channel += kLanes)
      if (channel + kLanes <= s->channels && s->taps == 4)
        s->rough ? row<4, kLanes, true>(*s, item, channel) : row<4, kLanes>(*s, item, channel);
      else
        row<0, 0>(*s, item, channel);
  }
}

// Backwards in time: each step's gradient before silu goes to the inputs it was made of.
void conv_backward(const EdgesepConvBackward* s, int64_t first, int64_t end) {
  const int64_t taps = s->taps, length = s->length, channels = s->channels;
  for (int64_t channel = 0; channel < channels; channel += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, channels - channel);
    Vec w[kMaxTaps], dw[kMaxTaps] = {}, dbias{};
    load_taps(s->w + channel * taps, count, taps, w);
    const Vec bias = s->bias ? load(s->bias + channel, count) : Vec{};
    for (int64_t item = first; item < end; ++item) {
      const float *x = s->x + item * length * channels + channel, *dy = s->dy + item * length * channels + channel;
      float* dx = s->dx + item * length * channels + channel;
      const auto place = [&](int64_t t) { return (s->reverse ? length - 1 - t : t) * channels; };
      const auto input = [&](int64_t t) { return t < 0 ? Vec{} : load(x + place(t), count); };
      Vec window[kMaxTaps], open[kMaxTaps] = {};  // inputs of step t; gradients not yet complete of those inputs
      for (int64_t k = 0; k < taps; ++k) window[k] = input(length - taps + k);
      for (int64_t t = length - 1; t >= 0; --t) {
        Vec before = bias;
        for (int64_t k = 0; k < taps; ++k) before += w[k] * window[k];
        const Vec gate = sigmoid(before);
        const Vec g = load(dy + place(t), count) * gate * (1.0f + before * (1.0f - gate));
        dbias += g;
        for (int64_t k = 0; k < taps; ++k) {
          dw[k] += g * window[k];
          open[k] += g * w[k];
        }
        store(dx + place(t), open[taps - 1], count);
        for (int64_t k = taps - 1; k > 0; --k) {
          open[k] = open[k - 1];
          window[k] = window[k - 1];
        }
        open[0] = Vec{};
        window[0] = input(t - taps);
      }
    }
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < count; ++c) s->dw[(channel + c) * taps + k] += dw[k][c];
    if (s->dbias) store(s->dbias + channel, load(s->dbias + channel, count) + dbias, count);
  }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
