// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
#include "selective_scan.h"

#include <algorithm>

#include "vec.h"
#include "window_product.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

constexpr int kMaxState = EDGESEP_SCAN_MAX_STATE;
constexpr int64_t kChunk = 8;  // steps
constexpr int64_t kGroup = EDGESEP_WINDOW_GROUP;  // channels of a group of the matrix that makes their step sizes

// How exponents stay within the bounds of exp2. Holding each of them there is a fifth of the work, and almost never needed:
// so a row is first done without, and again if one was out of bounds. Or the processor scales by any power of two.
enum Bounds { kFoundOut, kHeld, kScaled };

// On Intel's processors that is one step in place of three. Those of AMD, for which the scan is compiled with products of
// pairs (dispatch.cpp), have adders beside their multipliers, which make such steps for nothing.
#if defined(__AVX512DQ__) && !defined(__AVX512BF16__)
constexpr bool kScales = true;
#else
constexpr bool kScales = false;
#endif

template <Bounds kBounds, bool kRough>
inline Vec decayed(Vec exponent) {
  if constexpr (kBounds == kScaled)
    return scaled_exp2<kRough>(exponent);
  else
    return kBounds == kHeld ? exp2(exponent) : exp2_within<kRough>(exponent);
}

// A of one register of channels as (state, lanes), scaled for exp2, and its largest magnitude a lane. Returns 0 in every
// lane, or NaN where A holds one.
Vec load_decay(const float* A, int64_t channels, int64_t state, Vec* out, Vec* steepest) {
  float lanes[kLanes];
  Vec poison{};
  *steepest = Vec{};
  for (int64_t n = 0; n < state; ++n) {
    for (int64_t c = 0; c < kLanes; ++c) lanes[c] = c < channels ? A[c * state + n] * kLog2E : 0;
    out[n] = load(lanes, kLanes);
    poison += out[n] - out[n];
    const Vec slope = magnitude(out[n]);
    *steepest = slope > *steepest ? slope : *steepest;
  }
  return poison;
}

// The state of one register of channels, (state, lanes), in one of the two orders in which it is handed over.
class States {
 public:
  States(const EdgesepScan& s, int64_t item, int64_t channel, int64_t count) : count_(count), state_(s.state) {
    const int64_t groups = (s.channels + kRowChannels - 1) / kRowChannels;
    grouped_ = s.grouped != 0;
    at_ = grouped_ ? (item * groups + channel / kRowChannels) * state_ * kRowChannels + channel % kRowChannels
                   : (item * s.channels + channel) * state_;
  }

  void read(const float* from, Vec* h) const {
    for (int64_t n = 0; n < state_; ++n) {
      float lanes[kLanes] = {};
      if (from && grouped_) std::memcpy(lanes, from + at_ + n * kRowChannels, sizeof lanes);
      for (int64_t c = 0; from && !grouped_ && c < count_; ++c) lanes[c] = from[at_ + c * state_ + n];
      h[n] = load(lanes, kLanes);
    }
  }

  void write(const Vec* h, float* to) const {
    for (int64_t n = 0; n < state_; ++n)
      if (grouped_)
        store(to + at_ + n * kRowChannels, h[n], kLanes);
      else
        for (int64_t c = 0; c < count_; ++c) to[at_ + c * state_ + n] = h[n][c];
  }

 private:
  int64_t count_, state_, at_;
  bool grouped_;
};

// One batch item, one register of channels from `channel` on. With kState and kCount known, the state lives in registers
// (AVX-512) or in the first-level cache. False where it must be done again, with exponents held within bounds.
template <int kState, int kCount, Bounds kBounds, bool kRough = false>
bool row(const EdgesepScan& s, int64_t item, int64_t channel) {
  const int64_t state = kState ? kState : s.state;
  const int64_t count = kCount ? kCount : std::min<int64_t>(kLanes, s.channels - channel);
  Vec decay[kState ? kState : kMaxState], h[kState ? kState : kMaxState];
  Vec steepest;
  const Vec poison = load_decay(s.A + channel * state, count, state, decay, &steepest);
  const States states(s, item, channel, count);
  states.read(s.initial_state, h);
  const Vec bias = s.delta_bias ? load(s.delta_bias + channel, count) + poison : poison;
  const Vec skip = s.D ? load(s.D + channel, count) : Vec{};
  // Where step t of the recurrence lies in the tensors, in rows.
  const auto place = [&](int64_t t) { return item * s.length + (s.reverse ? s.length - 1 - t : t); };
  const float* const steps_of = s.delta ? nullptr : s.steps + channel / kGroup * s.rank * kGroup + channel % kGroup;
  const auto delta = [&](int64_t t) {
    if (s.delta) return load(s.delta + t * s.channels + channel, count) + bias;
    Vec sum = bias;
    for (int64_t r = 0; r < s.rank; ++r) sum += load(steps_of + r * kGroup, kLanes) * s.low[t * s.rank + r];
    return sum;
  };
  Vec largest{};
  for (int64_t begin = 0; begin < s.length; begin += kChunk) {
    // First what a chunk's steps need that does not depend on the state: their long chains of operations overlap. Within
    // one step after the other the processor would wait for each chain, as its window holds little more than a step.
    const int64_t steps = std::min(kChunk, s.length - begin);
    Vec dts[kChunk], xs[kChunk], skips[kChunk], gates[kChunk];
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = place(begin + k), at = t * s.channels + channel;
      // Steps lie a row of channels apart: too far for the processor to fetch them ahead by itself.
      const int64_t ahead = begin + k + kChunk < s.length ? place(begin + k + kChunk) * s.channels + channel : at;
      if (s.delta) __builtin_prefetch(s.delta + ahead);
      __builtin_prefetch(s.u + ahead);
      if (s.z) __builtin_prefetch(s.z + ahead);
      __builtin_prefetch(s.y + ahead, 1);
      Vec dt = delta(t);
      if (s.delta_softplus) dt = softplus<kRough, kBounds == kScaled>(dt);
      const Vec u = load(s.u + at, count);
      if constexpr (kBounds == kFoundOut) {
        const Vec exponent = magnitude(dt) * steepest;
        largest = exponent > largest ? exponent : largest;
      }
      dts[k] = dt;
      xs[k] = dt * u;
      skips[k] = skip * u;
      if (s.z) gates[k] = silu<kRough, kBounds == kScaled>(load(s.z + at, count));
    }
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = place(begin + k);
      const float *B = s.B + t * state, *C = s.C + t * state;
      const Vec dt = dts[k], x = xs[k];
      const auto advance = [&](int64_t n) {
        h[n] = decayed<kBounds, kRough>(dt * decay[n]) * h[n] + x * B[n];
        return h[n] * C[n];
      };
      Vec y0 = skips[k], y1{};
#pragma GCC unroll 8
      for (int64_t n = 0; n + 1 < state; n += 2) {
        y0 += advance(n);
        y1 += advance(n + 1);
      }
      if (state % 2) y0 += advance(state - 1);
      Vec y = y0 + y1;
      if (s.z) y *= gates[k];
      store(s.y + t * s.channels + channel, y, count);
    }
  }
  if (kBounds == kFoundOut && any_above(largest, 126.0f)) return false;
  if (s.last_state) states.write(h, s.last_state);
  return true;
}

template <Bounds kBounds>
bool row(const EdgesepScan& s, int64_t item, int64_t channel) {
  if (channel + kLanes > s.channels) return row<0, 0, kBounds>(s, item, channel);
  if (s.state != 16) return row<0, kLanes, kBounds>(s, item, channel);
  return kBounds != kHeld && s.rough ? row<16, kLanes, kBounds, true>(s, item, channel)
                                     : row<16, kLanes, kBounds>(s, item, channel);
}

}  // namespace

void scan(const EdgesepScan* s, int64_t first, int64_t end) {
  const int64_t blocks = (s->channels + kRowChannels - 1) / kRowChannels;
  [[maybe_unused]] bool careful = false;  // once needed, it is likely to be needed again
  for (int64_t r = first; r < end; ++r) {
    const int64_t item = r / blocks, from = r % blocks * kRowChannels;
    for (int64_t channel = from; channel < std::min(from + kRowChannels, s->channels); channel += kLanes) {
      if constexpr (kScales) {
        row<kScaled>(*s, item, channel);
      } else {
        careful = careful || !row<kFoundOut>(*s, item, channel);
        if (careful) row<kHeld>(*s, item, channel);
      }
    }
  }
}

// The state of every step is recomputed into the workspace, then the recurrence is run backwards through it.
void scan_backward(const EdgesepScanBackward* s, int64_t first, int64_t end) {
  const int64_t state = s->state, length = s->length, channels = s->channels;
  Vec* const history = reinterpret_cast<Vec*>(s->workspace);  // (length, state) of kLanes
  Vec* const sums = history + length * state;                 // dB and dC before lanes are added: (length, 2, state)
  for (int64_t item = first; item < end; ++item) {
    // Where step t of the recurrence lies in the tensors, in rows.
    const auto place = [&](int64_t t) { return item * length + (s->reverse ? length - 1 - t : t); };
    std::fill(sums, sums + length * 2 * state, Vec{});
    for (int64_t channel = 0; channel < channels; channel += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, channels - channel);
      Vec decay[kMaxState], h[kMaxState], g[kMaxState], dA[kMaxState];
      Vec steepest;
      load_decay(s->A + channel * state, count, state, decay, &steepest);
      std::fill(h, h + state, Vec{});
      std::fill(g, g + state, Vec{});
      std::fill(dA, dA + state, Vec{});
      const Vec bias = s->delta_bias ? load(s->delta_bias + channel, count) : Vec{};
      const Vec skip = s->D ? load(s->D + channel, count) : Vec{};
      Vec dskip{}, dbias{};
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = place(t) * channels + channel;
        Vec dt = load(s->delta + at, count) + bias;
        if (s->delta_softplus) dt = softplus(dt);
        const Vec x = dt * load(s->u + at, count);
        const float* B = s->B + place(t) * state;
        for (int64_t n = 0; n < state; ++n) {
          h[n] = exp2(dt * decay[n]) * h[n] + x * B[n];
          history[t * state + n] = h[n];
        }
      }
      for (int64_t t = length - 1; t >= 0; --t) {
        const int64_t at = place(t) * channels + channel;
        const Vec raw = load(s->delta + at, count) + bias, u = load(s->u + at, count);
        const Vec dt = s->delta_softplus ? softplus(raw) : raw, x = dt * u;
        const float *B = s->B + place(t) * state, *C = s->C + place(t) * state;
        const Vec *now = history + t * state, *before = now - state;
        Vec *dB = sums + t * 2 * state, *dC = dB + state;
        Vec dy = load(s->dy + at, count);
        if (s->z) {
          const Vec z = load(s->z + at, count), gate = sigmoid(z);
          Vec y = skip * u;
          for (int64_t n = 0; n < state; ++n) y += now[n] * C[n];
          store(s->dz + at, dy * y * gate * (1.0f + z * (1.0f - gate)), count);
          dy *= z * gate;
        }
        Vec through_x{}, through_decay{};
        for (int64_t n = 0; n < state; ++n) {
          const Vec a = exp2(dt * decay[n]), gn = g[n] + dy * C[n];
          dC[n] += dy * now[n];
          dB[n] += gn * x;
          through_x += gn * B[n];
          const Vec ga = gn * a;
          if (t) {
            const Vec q = ga * before[n];
            through_decay += q * decay[n];
            dA[n] += q * dt;
          }
          g[n] = ga;
        }
        Vec ddelta = through_x * u + through_decay * (1 / kLog2E);
        if (s->delta_softplus) ddelta *= sigmoid(raw);
        dskip += dy * u;
        dbias += ddelta;
        store(s->du + at, through_x * dt + dy * skip, count);
        store(s->ddelta + at, ddelta, count);
      }
      for (int64_t n = 0; n < state; ++n)
        for (int64_t c = 0; c < count; ++c) s->dA[(channel + c) * state + n] += dA[n][c];
      if (s->dD) store(s->dD + channel, load(s->dD + channel, count) + dskip, count);
      if (s->ddelta_bias) store(s->ddelta_bias + channel, load(s->ddelta_bias + channel, count) + dbias, count);
    }
    for (int64_t t = 0; t < length; ++t)
      for (int64_t n = 0; n < state; ++n) {
        s->dB[place(t) * state + n] += sum(sums[t * 2 * state + n]);
        s->dC[place(t) * state + n] += sum(sums[(t * 2 + 1) * state + n]);
      }
  }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
