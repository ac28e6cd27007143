// Vectors of float of a tier: what a pass over elements is written with, once, and compiled for each tier.
//
// Included by tier_*.cpp alone, each of which names its tier in QLORA_TIER and is compiled with that tier's flags.
// EVERYTHING that such a file compiles is in namespace qlora::QLORA_TIER: the linker keeps one of several functions of the
// same name, and one that was compiled for AVX-512 must never serve a processor without it. For the same reason no header
// of the C++ library with functions in it is included: no <vector>, no <algorithm>.
#pragma once
#ifndef QLORA_TIER
#error "a tier's file names its tier before it includes this"
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define QLORA_INLINE __attribute__((always_inline)) inline

namespace qlora {
// The bits of a bfloat16.
struct bf16 {
  uint16_t bits;
};
}  // namespace qlora

namespace qlora::QLORA_TIER {

template <class T>
QLORA_INLINE constexpr T least(T a, T b) {
  return a < b ? a : b;
}

// ceil(a / b) for a >= 0, b > 0.
QLORA_INLINE constexpr int64_t pieces_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __AVX512F__

// 16 floats.
struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

QLORA_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
QLORA_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
QLORA_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
QLORA_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
QLORA_INLINE Vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
QLORA_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// Rounded to the nearest, ties to even, in the low 16 bits of each lane; a NaN becomes a quiet NaN.
QLORA_INLINE __m512i rounded(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v), high = _mm512_srli_epi32(bits, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(_mm512_srli_epi32(up, 16), nan, high, _mm512_set1_epi32(0x40));
}
QLORA_INLINE __m256i narrow(Vec a) { return _mm512_cvtepi32_epi16(rounded(a)); }
QLORA_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }

// The first n of a vector, 0 < n < width; what is not loaded is 0.
QLORA_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), p)}; }
QLORA_INLINE void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << n) - 1), a.v); }
QLORA_INLINE Vec load(const bf16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << n) - 1), p));
}
QLORA_INLINE void store(bf16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1 << n) - 1), narrow(a));
}

QLORA_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
QLORA_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
QLORA_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
QLORA_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
QLORA_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
QLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QLORA_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
QLORA_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN
QLORA_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
QLORA_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a 2^n, for whole n.
QLORA_INLINE Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
QLORA_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
QLORA_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#else

// 8 floats.
struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

QLORA_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
QLORA_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
QLORA_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
QLORA_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
QLORA_INLINE Vec widen(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }
QLORA_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Rounded to the nearest, ties to even, in the low 16 bits of each lane; a NaN becomes a quiet NaN.
QLORA_INLINE __m256i rounded(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v), high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
}
QLORA_INLINE __m128i narrow(Vec a) {
  const __m256i r = rounded(a);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
QLORA_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }

// The first n of a vector, 0 < n < width; what is not loaded is 0.
QLORA_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QLORA_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
QLORA_INLINE void store(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }
QLORA_INLINE Vec load(const bf16* p, int64_t n) {
  alignas(16) bf16 whole[8] = {};
  for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
QLORA_INLINE void store(bf16* p, Vec a, int64_t n) {
  alignas(16) bf16 whole[8];
  store(whole, a);
  for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
}

QLORA_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
QLORA_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
QLORA_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
QLORA_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
QLORA_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
QLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
QLORA_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
QLORA_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where either is NaN
QLORA_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
QLORA_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
QLORA_INLINE __m256 power2(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// a 2^n, for whole n from -252 to 254.
QLORA_INLINE Vec scale2(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power2(half)), power2(_mm256_sub_epi32(whole, half)))};
}
QLORA_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
QLORA_INLINE float largest(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#endif

// As store, but a denormal may become 0.
QLORA_INLINE void store_normal(float* p, Vec a) { store(p, a); }
#ifdef __AVX512BF16__
QLORA_INLINE void store_normal(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
#else
QLORA_INLINE void store_normal(bf16* p, Vec a) { store(p, a); }
#endif

// Pairs of bf16, the first in the low half of a dword; a denormal may become 0. `p` has Vec::width dwords.
QLORA_INLINE void store_pairs(float* p, Vec first, Vec second) {
#ifdef __AVX512BF16__
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(zip, halves));
#elif defined(__AVX512F__)
  _mm512_storeu_si512(p, _mm512_or_si512(rounded(first), _mm512_slli_epi32(rounded(second), 16)));
#else
  const __m256i pairs = _mm256_or_si256(rounded(first), _mm256_slli_epi32(rounded(second), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
#endif
}

// The same of bf16 as they are: first and second have Vec::width each.
QLORA_INLINE void store_pairs(float* p, const bf16* first, const bf16* second) {
#ifdef __AVX512F__
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)));
  const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(second)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
#endif
}

// The first of such pairs, and the second, as floats.
QLORA_INLINE void load_pairs(const float* p, Vec& first, Vec& second) {
#ifdef __AVX512F__
  const __m512i pairs = _mm512_loadu_si512(p);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#else
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
#endif
}

// Of 16 signed bytes, the Vec::width from number `start` on, as floats: a multiple of that.
QLORA_INLINE Vec floats_of(__m128i bytes, int start) {
#ifdef __AVX512F__
  (void)start;  // there is only 0
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
#else
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(start ? _mm_unpackhi_epi64(bytes, bytes) : bytes))};
#endif
}

// A square of Vec::width x Vec::width dwords: rows become columns. Rows are so many dwords apart.
QLORA_INLINE void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
#ifdef __AVX512F__
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_row);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // a[i + c] has columns c, c + 4, c + 8, c + 12 of four rows
    for (int c = 0; c < 4; c += 2) {
      const __m512d low = _mm512_castps_pd(b[i + c / 2]), high = _mm512_castps_pd(b[i + c / 2 + 2]);
      a[i + c] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), even1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd), odd1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * to_row, _mm512_shuffle_f32x4(even0, even1, 0x88));
    _mm512_storeu_ps(to + (c + 4) * to_row, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    _mm512_storeu_ps(to + (c + 8) * to_row, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    _mm512_storeu_ps(to + (c + 12) * to_row, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
#else
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)  // a[i + c] has columns c and c + 4 of four rows
    for (int c = 0; c < 4; c += 2) {
      const __m256d low = _mm256_castps_pd(b[i + c / 2]), high = _mm256_castps_pd(b[i + c / 2 + 2]);
      a[i + c] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      a[i + c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * to_row, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(to + (c + 4) * to_row, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
#endif
}

// A table of 16 floats, looked up by codes of 0 to 15.
struct Table16 {
#ifdef __AVX512F__
  __m512 values;
  QLORA_INLINE explicit Table16(const float* p) : values(_mm512_loadu_ps(p)) {}
  // Of 16 codes, a byte each, the Vec::width from number `start` on: there is only 0.
  QLORA_INLINE Vec of(__m128i codes, int) const {
    return {_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), values)};
  }
#else
  __m256 low, high;
  QLORA_INLINE explicit Table16(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  // Of 16 codes, a byte each, the Vec::width from number `start` on, 0 or 8.
  QLORA_INLINE Vec of(__m128i codes, int start) const {
    const __m256i index = _mm256_cvtepu8_epi32(start ? _mm_unpackhi_epi64(codes, codes) : codes);
    const __m256 eighth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // as the sign, which blendv looks at
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), eighth_bit)};
  }
#endif
};

// While it lives, the thread computes with denormals as zeros: on some processors each costs a hundred cycles.
class DenormalsAreZero {
  const unsigned before_ = _mm_getcsr();

 public:
  QLORA_INLINE DenormalsAreZero() { _mm_setcsr(before_ | 0x8040); }
  QLORA_INLINE ~DenormalsAreZero() { _mm_setcsr(before_); }
};

// 2^x to two units in the last place: 0 far below the range, infinity above it, NaN of NaN. By the series of 2^f on
// [-1/2, 1/2], whose first term left out is below 2^-27.
QLORA_INLINE Vec exp2(Vec x) {
  const Vec bounded = max(set1(-200.0f), min(set1(200.0f), x));
  const Vec whole = round(bounded), f = sub(bounded, whole);
  Vec p = set1(1.5252733804059841e-05f);  // ln(2)^k / k!, k = 7 down to 0
  p = fma(p, f, set1(1.5403530393381606e-04f));
  p = fma(p, f, set1(1.3333558146428443e-03f));
  p = fma(p, f, set1(9.6181291076284769e-03f));
  p = fma(p, f, set1(5.5504108664821576e-02f));
  p = fma(p, f, set1(2.4022650695910072e-01f));
  p = fma(p, f, set1(6.9314718055994529e-01f));
  p = fma(p, f, set1(1.0f));
  return scale2(p, whole);
}

}  // namespace qlora::QLORA_TIER
