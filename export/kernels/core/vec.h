// One register of floats in the compiler's own vector type: one source for AVX-512 (16 lanes), AVX2 (8), NEON and SSE
// (4). Hardly any intrinsics, so that a new instruction set costs a compiler flag and no code. Never wider than a
// register: compilers take wider vectors apart through memory and compare them lane by lane.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace edgesep {
namespace EDGESEP_ISA {  // or the linker would keep one instruction set's copy for all

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kRowChannels = 16;  // what callers split over threads, a cache line: the same on every instruction set
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline Vec splat(float x) { return Vec{} + x; }

// The first `count` lanes, the rest zero. With the constant kLanes it is one load.
template <class Lanes>
inline Lanes load_as(const void* p, int64_t count) {
  Lanes v{};
  if (count == kLanes)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, static_cast<size_t>(count) * (sizeof v / kLanes));
  return v;
}

template <class Lanes>
inline void store_as(void* p, Lanes v, int64_t count) {
  if (count == kLanes)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, static_cast<size_t>(count) * (sizeof v / kLanes));
}

inline Vec load(const float* p, int64_t count) { return load_as<Vec>(p, count); }
inline void store(float* p, Vec v, int64_t count) { store_as(p, v, count); }

inline Vec to_floats(Integers i) { return __builtin_convertvector(i, Vec); }
inline Integers rounded(Vec v) {  // to nearest, within 2**22
  Integers i;
  v += 12582912.0f;
  std::memcpy(&i, &v, sizeof i);
  return i - 0x4b400000;
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

// Two bfloat16 in the bits of a float, the first one in the lower half: weights or inputs in a product of pairs.
inline uint32_t bits_of(const float* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

inline uint32_t rounded_bits(float x) {  // to the nearest bfloat16, ties to even; in the upper half
  const uint32_t bits = bits_of(&x);
  return (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
}

// What is summed up in a product: a weight of each lane and what it meets, kMet floats from x on.
struct Single {
  static constexpr int kMet = 1;
  static Vec add(Vec sum, Vec weights, const float* x) { return sum + weights * *x; }
};

// Weights in pairs. They meet a pair where the processor sums products of pairs, elsewhere two floats: to round these, too,
// would gain nothing.
#if defined(__AVX512BF16__)
constexpr bool kPairProducts = true;
struct Pair {
  static constexpr int kMet = 1;
  static Vec add(Vec sum, Vec weights, const float* x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)(IntVec{} + bits_of(x)));
  }
};
#else
constexpr bool kPairProducts = false;
struct Pair {
  static constexpr int kMet = 2;
  static Vec add(Vec sum, Vec weights, const float* x) {
    const IntVec both = float_to_bits(weights);
    return sum + bits_to_float(both << 16) * x[0] + bits_to_float(both & 0xffff0000u) * x[1];
  }
};
#endif

// x (count), an even number, as pairs.
inline void to_pairs(const float* x, int64_t count, float* pairs) {
  for (int64_t i = 0; i < count / 2; ++i) {
    const uint32_t bits = rounded_bits(x[2 * i]) >> 16 | rounded_bits(x[2 * i + 1]);
    std::memcpy(pairs + i, &bits, sizeof bits);
  }
}

// Comparisons with NaN are false, so that both keep it. (One instruction, of which GCC makes two.)
#if defined(__AVX512F__)
inline Vec at_least(Vec x, float low) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)splat(low), (__m512)x); }
inline Vec at_most(Vec x, float high) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)splat(high), (__m512)x); }
#else
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }
#endif

// Hides from the compiler where x comes from. The exponents are products, and an addition to a product would be fused: the
// multipliers, which are the bottleneck of a scan, would do what the adders beside them have time for.
inline Vec apart(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// 2**f for f within [-0.5, 0.5], with a relative error below 2e-7; exactly 1 at 0. The polynomial is the best one of degree 5
// with p(0) = 1; a rough one, of degree 3, leaves an error of 1.1e-4.
template <bool kRough>
inline Vec exp2_of_rest(Vec f) {
  Vec p;
  if constexpr (kRough) {
    p = splat(5.50089300e-2f);
    p = p * f + 2.42210970e-1f;
    p = p * f + 6.93282930e-1f;
  } else {
    p = splat(1.32647273e-3f);
    p = p * f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
  }
  return p * f + 1.0f;
}

// 2**x for x within [-126, 127], as exact. NaN stays NaN unless its payload is exotic.
template <bool kRough = false>
inline Vec exp2_within(Vec product) {
  const Vec x = apart(product);
  // Adding 1.5 * 2**23 rounds to an integer and leaves that integer in the low bits.
  const Vec shifted = x + 12582912.0f;
  const Vec p = exp2_of_rest<kRough>(x - (shifted - 12582912.0f));
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

#if defined(__AVX512DQ__)
// The same for any x: the processor takes x apart, and knows the bounds. A rough one takes x + 0.5, whose whole number below
// is what the processor scales by, and the same polynomial of the rest of that.
template <bool kRough = false>
inline Vec scaled_exp2(Vec x) {
  constexpr int kToNearest = 8, kBelow = 9;
  if constexpr (kRough) {
    const Vec moved = x + 0.5f, rest = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)moved, kBelow);
    Vec p = splat(5.50089300e-02f);
    p = p * rest + 1.59697575e-01f;
    p = p * rest + 4.92328657e-01f;
    return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)(p * rest + 7.07035161e-01f), (__m512)moved);
  }
  const Vec f = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, kToNearest);
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)exp2_of_rest<kRough>(f), (__m512)(x - f));
}
#else
template <bool kRough = false>
Vec scaled_exp2(Vec x);
#endif

// 2**x with x held within [-126, 127].
inline Vec exp2(Vec x) { return exp2_within(at_most(at_least(x, -126.0f), 127.0f)); }

inline Vec magnitude(Vec x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

// Whether any lane is above `limit`; NaN is not.
inline bool any_above(Vec x, float limit) {
  for (int i = 0; i < kLanes; ++i)
    if (x[i] > limit) return true;
  return false;
}

// f with a count, from 1 to `most`, as a type: a loop over it is unrolled, and what it sums stays in registers.
template <int most, typename F>
inline void with_constant(int64_t count, F f) {
  if (count == most) return f(std::integral_constant<int, most>{});
  if constexpr (most > 1) with_constant<most - 1>(count, f);
}

constexpr float kLog2E = 1.44269504088896341f;

template <bool kRough = false, bool kScaled = false>
inline Vec exp(Vec x) {
  if constexpr (kScaled)
    return scaled_exp2<kRough>(x * kLog2E);
  else
    return exp2_within<kRough>(at_most(at_least(x * kLog2E, -126.0f), 127.0f));
}

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

// The same with a relative error below 6e-5: no division.
inline Vec rough_log1p_unit(Vec e) {
  Vec p = splat(4.13484637e-2f);
  p = p * e - 1.57430245e-1f;
  p = p * e + 3.06303310e-1f;
  p = p * e - 4.96978336e-1f;
  p = p * e + 9.99943292e-1f;
  return p * e;
}

template <bool kRough = false, bool kScaled = false>
inline Vec softplus(Vec x) {
  const Vec e = exp<kRough, kScaled>(-magnitude(x));
  return (x > 0.0f ? x : x - x) + (kRough ? rough_log1p_unit(e) : log1p_unit(e));
}

inline Vec sigmoid(Vec x) { return 1.0f / (exp(-x) + 1.0f); }

// A rough one has a relative error of 6e-5 where the processor has an instruction for that.
template <bool kRough>
inline Vec quotient(Vec a, Vec b) {
#if defined(__AVX512F__)
  if constexpr (kRough) return a * (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);
#endif
  return a / b;
}

template <bool kRough = false, bool kScaled = false>
inline Vec silu(Vec z) {
  return quotient<kRough>(z, exp<kRough, kScaled>(-z) + 1.0f);
}

inline float sum(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
