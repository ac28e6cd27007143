// The NF4 quantizer: codes and scales are, bit for bit, those of quantization/nf4.py.
//
// The code of a value is the number of thresholds, the midpoints between neighboring levels, that are below it. A binary
// search over the 15 takes four comparisons, and what is compared with at each depth fits eight lanes, so that one
// permutation finds it with AVX2 and AVX-512 alike.
#pragma once
#include <cstring>

#include "passes.hpp"
#include "simd.hpp"

namespace qlora::QLORA_TIER {

constexpr int kNf4Block = 64;
constexpr float kSmallestScale = 1e-38f;
constexpr float kNf4Levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr float nf4_threshold(int i) { return (kNf4Levels[i] + kNf4Levels[i + 1]) / 2; }

// Denormal numbers count here, whatever the thread's mode is.
struct WithDenormals {
  unsigned before = _mm_getcsr();
  WithDenormals() { _mm_setcsr(before & ~0x8040u); }
  ~WithDenormals() { _mm_setcsr(before); }
};

#ifdef __AVX512F__
using Codes = __m512i;
QLORA_INLINE Codes no_codes() { return _mm512_setzero_si512(); }
// 2 code + (threshold < x): a level of the search.
QLORA_INLINE Codes descend(Codes code, Vec threshold, Vec x) {
  const Codes twice = _mm512_add_epi32(code, code);
  const __mmask16 above = _mm512_cmp_ps_mask(threshold.v, x.v, _CMP_LT_OQ);
  return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
}
QLORA_INLINE Vec eight(const float* table) { return {_mm512_broadcast_f32x8(_mm256_loadu_ps(table))}; }
QLORA_INLINE Vec lookup(Vec table, Codes index) { return {_mm512_permutexvar_ps(index, table.v)}; }
QLORA_INLINE Codes magnitude_bits(Vec x) { return _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)); }
QLORA_INLINE Codes larger(Codes a, Codes b) { return _mm512_max_epi32(a, b); }
QLORA_INLINE int32_t largest(Codes a) { return _mm512_reduce_max_epi32(a); }
// 64 codes -> 32 bytes, the earlier of a pair in the high nibble.
QLORA_INLINE void pack_codes(const Codes* codes, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes[i], 4), _mm512_srli_epi64(codes[i], 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm512_cvtepi64_epi8(pairs));
  }
}
#else
using Codes = __m256i;
QLORA_INLINE Codes no_codes() { return _mm256_setzero_si256(); }
// 2 code + (threshold < x): a level of the search.
QLORA_INLINE Codes descend(Codes code, Vec threshold, Vec x) {
  const Codes above = _mm256_castps_si256(_mm256_cmp_ps(threshold.v, x.v, _CMP_LT_OQ));
  return _mm256_sub_epi32(_mm256_add_epi32(code, code), above);
}
QLORA_INLINE Vec eight(const float* table) { return {_mm256_loadu_ps(table)}; }
QLORA_INLINE Vec lookup(Vec table, Codes index) { return {_mm256_permutevar8x32_ps(table.v, index)}; }
QLORA_INLINE Codes magnitude_bits(Vec x) { return _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff)); }
QLORA_INLINE Codes larger(Codes a, Codes b) { return _mm256_max_epi32(a, b); }
QLORA_INLINE int32_t largest(Codes a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
// 64 codes -> 32 bytes, the earlier of a pair in the high nibble.
QLORA_INLINE void pack_codes(const Codes* codes, uint8_t* out) {
  // Packing works in halves of a vector: bytes of the low halves come first, then those of the high ones.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i byte = _mm256_set1_epi64x(0xff);
  __m256i words[2];
  for (int i = 0; i < 2; ++i) {
    __m256i pairs[4];
    for (int j = 0; j < 4; ++j) {
      const __m256i c = codes[4 * i + j];
      pairs[j] = _mm256_and_si256(_mm256_or_si256(_mm256_slli_epi64(c, 4), _mm256_srli_epi64(c, 32)), byte);
    }
    words[i] = _mm256_packus_epi32(_mm256_packus_epi32(pairs[0], pairs[1]), _mm256_packus_epi32(pairs[2], pairs[3]));
  }
  // (2 bytes of each of eight vectors' low halves, then of their high halves) -> pairs of 2 bytes side by side.
  const __m256i halves = _mm256_packus_epi16(words[0], words[1]);
  const __m256i mixed = _mm256_permutevar8x32_epi32(halves, order);
  const __m256i sorted = _mm256_shuffle_epi8(
      mixed, _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10,
                              11, 14, 15));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sorted);
}
#endif

QLORA_INLINE float widened(float x) { return x; }
QLORA_INLINE float widened(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// A full block. Returns the bits of the largest magnitude: as integers, magnitudes are ordered as the numbers are, with
// infinity and then NaN above all that is finite.
template <class T>
QLORA_INLINE int32_t quantize_block(const T* x, const Vec* tables, uint8_t* packed, float* absmax) {
  constexpr int kVectors = kNf4Block / Vec::width;
  Vec values[kVectors];
  Codes most = no_codes();
  for (int i = 0; i < kVectors; ++i) {
    values[i] = load(x + i * Vec::width);
    most = larger(most, magnitude_bits(values[i]));
  }
  const int32_t bits = largest(most);
  memcpy(absmax, &bits, sizeof bits);
  const Vec reciprocal = set1(1.0f / (*absmax > kSmallestScale ? *absmax : kSmallestScale));
  Codes codes[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const Vec scaled = mul(values[i], reciprocal);
    codes[i] = no_codes();
    for (int depth = 0; depth < 4; ++depth) codes[i] = descend(codes[i], lookup(tables[depth], codes[i]), scaled);
  }
  pack_codes(codes, packed);
  return bits;
}

// The last, short block: divided, not multiplied by a reciprocal, and with a scale that is never below the smallest.
template <class T>
inline int32_t quantize_short_block(const T* x, int64_t count, uint8_t* packed, float* absmax) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(widened(x[i]));
    int32_t bits;
    memcpy(&bits, &magnitude, sizeof bits);
    if (bits > most) most = bits;
  }
  memcpy(absmax, &most, sizeof most);
  if (!(*absmax > kSmallestScale)) *absmax = kSmallestScale;
  for (int64_t i = 0; i < count; i += 2) {
    int codes[2] = {0, 7};  // an odd last code is followed by that of 0
    for (int j = 0; j < 2 && i + j < count; ++j) {
      const float scaled = widened(x[i + j]) / *absmax;
      codes[j] = 0;
      for (int t = 0; t < 15; ++t) codes[j] += nf4_threshold(t) < scaled;
    }
    packed[i / 2] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
  }
  return most;
}

template <class T>
inline bool quantize_nf4(const T* weights, int64_t count, int64_t begin, int64_t end, uint8_t* packed, float* absmax) {
  const WithDenormals mode;
  float thresholds[4][8] = {
      {nf4_threshold(7)}, {nf4_threshold(3), nf4_threshold(11)}, {nf4_threshold(1), nf4_threshold(5), nf4_threshold(9), nf4_threshold(13)}};
  for (int i = 0; i < 8; ++i) thresholds[3][i] = nf4_threshold(2 * i);
  const Vec tables[4] = {eight(thresholds[0]), eight(thresholds[1]), eight(thresholds[2]), eight(thresholds[3])};
  int32_t most = 0;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kNf4Block, left = count - first;
    const int32_t bits = left >= kNf4Block ? quantize_block(weights + first, tables, packed + first / 2, absmax + block)
                                           : quantize_short_block(weights + first, left, packed + first / 2, absmax + block);
    if (bits > most) most = bits;
  }
  return most < 0x7f800000;
}

inline bool quantize_nf4_of(int type, const void* weights, int64_t count, int64_t begin, int64_t end, uint8_t* packed, float* absmax) {
  return type == kBf16 ? quantize_nf4(static_cast<const bf16*>(weights), count, begin, end, packed, absmax)
                       : quantize_nf4(static_cast<const float*>(weights), count, begin, end, packed, absmax);
}

}  // namespace qlora::QLORA_TIER
