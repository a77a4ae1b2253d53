// Sixteen floats in the compiler's own vector type: one source for AVX-512 (one register), AVX2 (two), NEON and SSE
// (four). No intrinsics, so that a new instruction set costs a compiler flag and no code.
#pragma once
#include <cstdint>
#include <cstring>

namespace edgesep {
namespace EDGESEP_ISA {  // or the linker would keep one instruction set's copy for all

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

inline Vec splat(float x) { return Vec{} + x; }

// The first `count` of 16 lanes, the rest zero. With the constant 16 it is one load.
inline Vec load(const float* p, int64_t count) {
  Vec v{};
  if (count == kLanes)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}

inline void store(float* p, Vec v, int64_t count) {
  if (count == kLanes)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

inline Vec bits_to_float(IntVec i) {
  Vec v;
  std::memcpy(&v, &i, sizeof v);
  return v;
}

inline IntVec float_to_bits(Vec v) {
  IntVec i;
  std::memcpy(&i, &v, sizeof i);
  return i;
}

// Comparisons with NaN are false, so that both keep it.
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }

// 2**x with a relative error below 2e-7; x is held within [-126, 127]. NaN stays NaN unless its payload is exotic.
inline Vec exp2(Vec x) {
  x = at_most(at_least(x, -126.0f), 127.0f);
  // Adding 1.5 * 2**23 rounds to an integer and leaves that integer in the low bits.
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);  // [-0.5, 0.5]
  Vec p = splat(1.5353362e-4f);
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

constexpr float kLog2E = 1.44269504088896341f;

inline Vec exp(Vec x) { return exp2(x * kLog2E); }

// log(1 + e) for e in [0, 1], exact in relative terms also for tiny e: 2 atanh(e / (2 + e)).
inline Vec log1p_unit(Vec e) {
  const Vec s = e / (e + 2.0f), q = s * s;
  Vec p = splat(2.0f / 15);
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return p * s;
}

inline Vec softplus(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  return (x > 0.0f ? x : x - x) + log1p_unit(exp(-magnitude));
}

inline Vec sigmoid(Vec x) { return 1.0f / (exp(-x) + 1.0f); }

inline Vec silu(Vec z) { return z / (exp(-z) + 1.0f); }

inline float sum(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
