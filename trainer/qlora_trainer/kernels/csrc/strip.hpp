// A strip: 32 columns of what a product multiplies with, in first-level cache.
//
// It has `steps` rows of 32 dwords. Of floats, a step is one index of the sum, and a dword the number of a column. Of bf16,
// a step is two indices, and a dword the two numbers, the lower index in its low half: what both the dot product and the
// tile unit take.
//
// What a weight is kept in matters only for how it becomes strips, over k for x W^T and over n for dy W:
// strip_over_k and strip_over_n of nf4_strip.hpp, int8_strip.hpp and dense_strip.hpp. Each returns the strip, made in the
// room that it is given, or lying in the weight as it is.
#pragma once
#include "simd.hpp"

namespace qlora::QLORA_TIER {

constexpr int kStrip = 32;  // columns
constexpr int kBlock = 32;  // indices of the sum that are made together: steps of floats, or twice those of bf16

// Two indices of the sum, the even one and the one after it, of Vec::width columns.
template <bool is_bf16>
QLORA_INLINE void store_two(float* strip, Vec even, Vec odd) {
  if constexpr (is_bf16) {
    store_pairs(strip, even, odd);
  } else {
    store(strip, even);
    store(strip + kStrip, odd);
  }
}
template <bool is_bf16>
constexpr int kDwordsOfTwo = is_bf16 ? kStrip : 2 * kStrip;

template <class T>
QLORA_INLINE __m128i load16(const T* bytes) {
  static_assert(sizeof(T) == 1);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

// Rows become columns: byte j of row i goes to byte i of row j. Each of the four rounds turns the eight bits of (i, j) by
// one place.
QLORA_INLINE void transpose16(__m128i* rows) {
  __m128i other[16];
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 8; ++i) {
      other[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      other[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
      rows[2 * i] = _mm_unpacklo_epi8(other[i], other[i + 8]);
      rows[2 * i + 1] = _mm_unpackhi_epi8(other[i], other[i + 8]);
    }
  }
}

}  // namespace qlora::QLORA_TIER
