// One register of floats in the compiler's own vector type: one source for AVX-512 (16 lanes), AVX2 (8), NEON and SSE
// (4). Hardly any intrinsics, so that a new instruction set costs a compiler flag and no code. Never wider than a
// register: compilers take wider vectors apart through memory and compare them lane by lane.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
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

// Integers where the processor sums their products: to each lane of a sum those of four unsigned with four signed bytes
// are added, or of two signed halves. Elsewhere these are only declared: code that needs them is not compiled.
// (Conversions are functions because GCC makes a register of bytes one by one.) `interleave` puts bytes of four rows, 4
// kLanes of each, side by side for such sums: kLanes of every row to a register.
#if defined(__AVX512BW__)
constexpr bool kIntegerProducts = true;
inline Integers from_bytes(const uint8_t* p, int64_t count) {
  return (Integers)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)load_as<Bytes>(p, count));
}
inline void store_bytes(uint8_t* p, Integers v) {
  store_as(p, (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v), kLanes);
}
inline Integers sum_halves(Integers a, Integers b) { return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline void interleave(const uint8_t* const* rows, Integers* to) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto row = [&](int i) { return _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_loadu_si512((const __m512i*)rows[i])); };
  const __m512i r[] = {row(0), row(1), row(2), row(3)};
  const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  to[0] = (Integers)_mm512_unpacklo_epi16(a, c), to[1] = (Integers)_mm512_unpackhi_epi16(a, c);
  to[2] = (Integers)_mm512_unpacklo_epi16(b, d), to[3] = (Integers)_mm512_unpackhi_epi16(b, d);
}
#elif defined(__AVX2__)
constexpr bool kIntegerProducts = true;
inline Integers from_bytes(const uint8_t* p, int64_t count) {
  int64_t bytes = 0;
  std::memcpy(&bytes, p, count == kLanes ? sizeof bytes : static_cast<size_t>(count));
  return (Integers)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
}
inline void store_bytes(uint8_t* p, Integers v) {
  const __m256i all = (__m256i)v;
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(halves, halves));
}
inline Integers sum_halves(Integers a, Integers b) { return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline void interleave(const uint8_t* const* rows, Integers* to) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const auto row = [&](int i) { return _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)rows[i]), order); };
  const __m256i r[] = {row(0), row(1), row(2), row(3)};
  const __m256i a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
  const __m256i c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
  to[0] = (Integers)_mm256_unpacklo_epi16(a, c), to[1] = (Integers)_mm256_unpackhi_epi16(a, c);
  to[2] = (Integers)_mm256_unpacklo_epi16(b, d), to[3] = (Integers)_mm256_unpackhi_epi16(b, d);
}
#elif defined(__SSE2__)
constexpr bool kIntegerProducts = true;
inline Integers from_bytes(const uint8_t* p, int64_t count) {
  int32_t bytes = 0;
  std::memcpy(&bytes, p, count == kLanes ? sizeof bytes : static_cast<size_t>(count));
  const __m128i none = _mm_setzero_si128();
  return (Integers)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), none), none);
}
inline void store_bytes(uint8_t* p, Integers v) {
  const __m128i halves = _mm_packs_epi32((__m128i)v, (__m128i)v);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
  std::memcpy(p, &bytes, sizeof bytes);
}
inline Integers sum_halves(Integers a, Integers b) { return (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b); }
inline void interleave(const uint8_t* const* rows, Integers* to) {
  const auto row = [&](int i) { return _mm_loadu_si128((const __m128i*)rows[i]); };
  const __m128i a = _mm_unpacklo_epi8(row(0), row(1)), b = _mm_unpackhi_epi8(row(0), row(1));
  const __m128i c = _mm_unpacklo_epi8(row(2), row(3)), d = _mm_unpackhi_epi8(row(2), row(3));
  to[0] = (Integers)_mm_unpacklo_epi16(a, c), to[1] = (Integers)_mm_unpackhi_epi16(a, c);
  to[2] = (Integers)_mm_unpacklo_epi16(b, d), to[3] = (Integers)_mm_unpackhi_epi16(b, d);
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool kIntegerProducts = true;
inline Integers from_bytes(const uint8_t* p, int64_t count) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, p, count == kLanes ? 4 : static_cast<size_t>(count));
  return (Integers)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}
inline void store_bytes(uint8_t* p, Integers v) {
  const uint16x4_t halves = vmovn_u32((uint32x4_t)v);
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  std::memcpy(p, &bytes, 4);
}
inline Integers sum_halves(Integers a, Integers b) {
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (Integers)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
inline void interleave(const uint8_t* const* rows, Integers* to) {
  const auto row = [&](int i) { return vld1q_u8(rows[i]); };
  const auto both = [](uint8x16_t a, uint8x16_t b, bool upper) {
    return (uint16x8_t)(upper ? vzip2q_u8(a, b) : vzip1q_u8(a, b));
  };
  for (int upper = 0; upper < 2; ++upper) {
    const uint16x8_t one = both(row(0), row(1), upper), other = both(row(2), row(3), upper);
    to[2 * upper] = (Integers)vzip1q_u16(one, other), to[2 * upper + 1] = (Integers)vzip2q_u16(one, other);
  }
}
#else
constexpr bool kIntegerProducts = false;
Integers from_bytes(const uint8_t* p, int64_t count);
void store_bytes(uint8_t* p, Integers v);
void interleave(const uint8_t* const* rows, Integers* to);
Integers sum_halves(Integers a, Integers b);
#endif

// Signed bytes of even and of odd places as halves.
typedef int16_t Halves __attribute__((vector_size(4 * kLanes)));
inline Integers even_bytes(Integers bytes) { return (Integers)((Halves)bytes << 8 >> 8); }
inline Integers odd_bytes(Integers bytes) { return (Integers)((Halves)bytes >> 8); }

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kByteProducts = true;  // in one instruction, or two
#else
constexpr bool kByteProducts = false;
#endif
#if defined(__AVX512VNNI__)
inline Integers add_bytes(Integers sum, Integers bytes, Integers by) {
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)by);
}
inline Integers add_halves(Integers sum, Integers halves, Integers by) {
  return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)halves, (__m512i)by);
}
#elif defined(__AVXVNNI__)
inline Integers add_bytes(Integers sum, Integers bytes, Integers by) {
  return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)by);
}
inline Integers add_halves(Integers sum, Integers halves, Integers by) {
  return (Integers)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)halves, (__m256i)by);
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline Integers add_halves(Integers sum, Integers halves, Integers by) { return sum + sum_halves(halves, by); }
// Both are unsigned or both are signed there: what is added to signed ones to make them so is taken off again, and the
// same for whatever else meets these bytes.
inline Integers add_bytes(Integers sum, Integers bytes, Integers by) {
  const uint8x16_t x = (uint8x16_t)bytes, moved = (uint8x16_t)(by ^ 0x80808080);
  const uint32x4_t apart = vdotq_u32(vdupq_n_u32(0), x, vdupq_n_u8(128));
  return (Integers)(vdotq_u32((uint32x4_t)sum, x, moved) - apart);
}
#else
inline Integers add_halves(Integers sum, Integers halves, Integers by) { return sum + sum_halves(halves, by); }
// Bytes of even and of odd places as halves: a processor's own products of bytes would stop at 2**15.
inline Integers add_bytes(Integers sum, Integers bytes, Integers by) {
  typedef uint16_t Unsigned __attribute__((vector_size(4 * kLanes)));
  return add_halves(add_halves(sum, bytes & 0x00ff00ff, even_bytes(by)), (Integers)((Unsigned)bytes >> 8), odd_bytes(by));
}
#endif

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

// 2**x for x within [-126, 127], with a relative error below 2e-7; exactly 1 at 0. NaN stays NaN unless its payload is
// exotic. The polynomial is the best one of degree 5 with p(0) = 1; a rough one, of degree 3, leaves an error of 1.1e-4.
template <bool kRough = false>
inline Vec exp2_within(Vec product) {
  const Vec x = apart(product);
  // Adding 1.5 * 2**23 rounds to an integer and leaves that integer in the low bits.
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);  // [-0.5, 0.5]
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
  p = p * f + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

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

template <bool kRough = false>
inline Vec exp(Vec x) {
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

template <bool kRough = false>
inline Vec softplus(Vec x) {
  const Vec e = exp<kRough>(-magnitude(x));
  return (x > 0.0f ? x : x - x) + (kRough ? rough_log1p_unit(e) : log1p_unit(e));
}

inline Vec sigmoid(Vec x) { return 1.0f / (exp(-x) + 1.0f); }

template <bool kRough = false>
inline Vec silu(Vec z) {
  return z / (exp<kRough>(-z) + 1.0f);
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
