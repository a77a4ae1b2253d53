// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// A head may have fewer channels than a register has lanes. So its values are first put side by side, and then lie as a
// vector that every register takes.
#include "head_norm.h"

#include <cmath>

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

typedef float Quad __attribute__((vector_size(16)));
typedef float One;

// The values of a head in a frame, side by side in `to`.
template <class Some>
inline void gather(const EdgesepHeadNorm& s, const float* x, const float* slope, float* to) {
  constexpr int64_t kCount = sizeof(Some) / sizeof(float);
  for (int64_t f = 0; f < s.bins; ++f, x += s.channels, to += s.features)
    for (int64_t i = 0; i < s.features; i += kCount) {
      Some v;
      std::memcpy(&v, x + i, sizeof v);
      if (slope) {
        Some less;
        std::memcpy(&less, slope + i, sizeof less);
        less *= v;
        v = v > less ? v : less;
      }
      std::memcpy(to + i, &v, sizeof v);
    }
}

// The sum of f over registers of v. Four sums: an addition takes as long as four can be begun in.
template <class F>
inline float total(const float* v, int64_t size, F f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
    for (int n = 0; n < 4; ++n) sums[n] += f(load(v + i + n * kLanes, kLanes));
  for (; i + kLanes <= size; i += kLanes) sums[0] += f(load(v + i, kLanes));
  float rest = 0;
  for (; i < size; ++i) rest += f(splat(v[i]))[0];
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

void normalize(const EdgesepHeadNorm& s, const float* gain, const float* bias, float* y) {
  const int64_t size = s.bins * s.features;
  const float count = static_cast<float>(size), mean = total(y, size, [](Vec v) { return v; }) / count;
  const float squares = total(y, size, [=](Vec v) { return (v - mean) * (v - mean); });
  const float inverse = 1 / std::sqrt(squares / count + s.epsilon);
  const auto part = [&](int64_t i, int64_t lanes) {
    const Vec v = (load(y + i, lanes) - mean) * inverse;
    store(y + i, v * load(gain + i, lanes) + load(bias + i, lanes), lanes);
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) part(i, kLanes);
  if (i < size) part(i, size - i);
}

}  // namespace

void head_norm(const EdgesepHeadNorm* s, int64_t first, int64_t end) {
  const int64_t together = edgesep_head_norm_frames(s), size = s->bins * s->features;
  for (int64_t n = first * together; n < end * together; ++n)
    for (int64_t h = 0; h < s->heads; ++h) {
      const int64_t channel = h * s->features;
      float* y = s->y + (h * s->frames + n) * size;
      const float* x = s->x + n * s->bins * s->channels + s->first + channel;
      const float* slope = s->slope ? s->slope + channel : nullptr;
      if (s->features % kLanes == 0)
        gather<Vec>(*s, x, slope, y);
      else if (s->features % 4 == 0)
        gather<Quad>(*s, x, slope, y);
      else
        gather<One>(*s, x, slope, y);
      normalize(*s, s->gain + h * size, s->bias + h * size, y);
    }
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
