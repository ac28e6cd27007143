// 8 bits -> a strip (strip.hpp). Every weight is code * scale in float, rounded once.
#pragma once
#include "strip.hpp"
#include "tier.hpp"

namespace qlora::QLORA_TIER {

// Columns n0 to n0 + 31, the sum over k: k0 to k0 + 32 blocks, both multiples of 32.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_k(const Int8Matrix& w, int64_t n0, int64_t k0, int64_t blocks, float* const room) {
  const int8_t* codes = w.codes + n0 * pieces_of(w.k, kBlock) * kBlock + k0 * kStrip;
  float* strip = room;
  Vec scales[kStrip / Vec::width];
  for (int i = 0; i < kStrip; i += Vec::width) scales[i / Vec::width] = load(w.scales + n0 + i);
  for (int64_t two = 0; two < blocks * kBlock / 2; ++two, codes += 2 * kStrip, strip += kDwordsOfTwo<is_bf16>)
    for (int half = 0; half < kStrip; half += 16) {
      const __m128i even = load16(codes + half), odd = load16(codes + kStrip + half);
      for (int i = 0; i < 16; i += Vec::width) {
        const Vec scale = scales[(half + i) / Vec::width];
        store_two<is_bf16>(strip + half + i, mul(floats_of(even, i), scale), mul(floats_of(odd, i), scale));
      }
    }
  return room;
}

// Columns k0 to k0 + 31, the sum over n: n0 to n0 + 32 blocks, both multiples of 32.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_n(const Int8Matrix& w, int64_t k0, int64_t n0, int64_t blocks, float* const room) {
  const int64_t kp = pieces_of(w.k, kBlock) * kBlock;
  float* strip = room;
  for (int64_t n = n0; n < n0 + blocks * kBlock; n += 16) {
    const int8_t* codes = w.codes + n / kStrip * kStrip * kp + k0 * kStrip + n % kStrip;
    __m128i rows[2][16];  // of 16 n, each for one k; after the transposition, of 16 k for one n
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) rows[half][i] = load16(codes + (half * 16 + i) * kStrip);
      transpose16(rows[half]);
    }
    for (int i = 0; i < 16; i += 2, strip += kDwordsOfTwo<is_bf16>) {
      const Vec even = set1(w.scales[n + i]), odd = set1(w.scales[n + i + 1]);
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < 16; j += Vec::width)
          store_two<is_bf16>(strip + half * 16 + j, mul(floats_of(rows[half][i], j), even),
                             mul(floats_of(rows[half][i + 1], j), odd));
    }
  }
  return room;
}

}  // namespace qlora::QLORA_TIER
