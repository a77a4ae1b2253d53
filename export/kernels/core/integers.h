// Products of integers in a register, where the processor sums them: one source for VNNI of either width, AVX-512, AVX2, SSE
// and ARM with dot products.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "vec.h"

namespace edgesep {
namespace EDGESEP_ISA {

// Integers where the processor sums their products: to each lane of a sum those of four unsigned with four signed bytes
// are added, or of two signed halves. Elsewhere these are only declared: code that needs them is not compiled.
// (Conversions are functions because GCC makes a register of bytes one by one.) `interleave` puts bytes of four rows, 4
// kLanes of each, side by side for such sums: kLanes of every row to a register. Processors interleave within 16 bytes
// alone, so `strip_of` reads a row with its words in the order that makes up for that.
#if defined(__AVX512BW__)
constexpr bool kIntegerProducts = true;
inline Integers from_bytes(const uint8_t* p, int64_t count) {
  return (Integers)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)load_as<Bytes>(p, count));
}
inline void store_bytes(uint8_t* p, Integers v) {
  store_as(p, (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v), kLanes);
}
inline Integers sum_halves(Integers a, Integers b) { return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline Integers strip_of(const uint8_t* p) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (Integers)_mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_loadu_si512((const __m512i*)p));
}
inline Integers low_bytes(Integers a, Integers b) { return (Integers)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
inline Integers high_bytes(Integers a, Integers b) { return (Integers)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
inline Integers low_halves(Integers a, Integers b) { return (Integers)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
inline Integers high_halves(Integers a, Integers b) { return (Integers)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
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
inline Integers strip_of(const uint8_t* p) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  return (Integers)_mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), order);
}
inline Integers low_bytes(Integers a, Integers b) { return (Integers)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
inline Integers high_bytes(Integers a, Integers b) { return (Integers)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }
inline Integers low_halves(Integers a, Integers b) { return (Integers)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
inline Integers high_halves(Integers a, Integers b) { return (Integers)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
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
inline Integers strip_of(const uint8_t* p) { return (Integers)_mm_loadu_si128((const __m128i*)p); }
inline Integers low_bytes(Integers a, Integers b) { return (Integers)_mm_unpacklo_epi8((__m128i)a, (__m128i)b); }
inline Integers high_bytes(Integers a, Integers b) { return (Integers)_mm_unpackhi_epi8((__m128i)a, (__m128i)b); }
inline Integers low_halves(Integers a, Integers b) { return (Integers)_mm_unpacklo_epi16((__m128i)a, (__m128i)b); }
inline Integers high_halves(Integers a, Integers b) { return (Integers)_mm_unpackhi_epi16((__m128i)a, (__m128i)b); }
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
inline Integers strip_of(const uint8_t* p) { return (Integers)vld1q_u8(p); }
inline Integers low_bytes(Integers a, Integers b) { return (Integers)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b); }
inline Integers high_bytes(Integers a, Integers b) { return (Integers)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b); }
inline Integers low_halves(Integers a, Integers b) { return (Integers)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
inline Integers high_halves(Integers a, Integers b) { return (Integers)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
#else
constexpr bool kIntegerProducts = false;
Integers from_bytes(const uint8_t* p, int64_t count);
void store_bytes(uint8_t* p, Integers v);
Integers strip_of(const uint8_t* p);
Integers low_bytes(Integers a, Integers b);
Integers high_bytes(Integers a, Integers b);
Integers low_halves(Integers a, Integers b);
Integers high_halves(Integers a, Integers b);
Integers sum_halves(Integers a, Integers b);
#endif

inline void interleave(const uint8_t* const* rows, Integers* to) {
  const Integers a = strip_of(rows[0]), b = strip_of(rows[1]), c = strip_of(rows[2]), d = strip_of(rows[3]);
  const Integers low = low_bytes(a, b), high = high_bytes(a, b);
  const Integers other_low = low_bytes(c, d), other_high = high_bytes(c, d);
  to[0] = low_halves(low, other_low), to[1] = high_halves(low, other_low);
  to[2] = low_halves(high, other_high), to[3] = high_halves(high, other_high);
}

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

}  // namespace EDGESEP_ISA
}  // namespace edgesep
