// 4 bits -> a strip (strip.hpp). Every weight is level * scale in float, rounded once.
#pragma once
#include "strip.hpp"
#include "tier.hpp"

namespace qlora::QLORA_TIER {

constexpr int kTile = 16;  // n, or pairs of k, of a block of codes

// Scales of `count` n from n0 on for the kth block of k: in place, or written to `room`.
QLORA_INLINE const float* scales_of(const Nf4Matrix& w, int64_t kth, int64_t n0, int64_t count, float* room) {
  const int64_t np = pieces_of(w.n, kStrip) * kStrip, per_row = w.k / w.block;
  if (w.scales) return w.scales + kth * np + n0;
  const uint8_t* codes = w.scale_codes + kth * np + n0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = least(n0 + i, w.n - 1);  // beyond the last row all levels are 0, so that any scale will do
    const float product = w.scale_levels[codes[i]] * w.scale_absmax[(n * per_row + kth) / 256];
    room[i] = product + w.scale_offset;
  }
  return room;
}

QLORA_INLINE __m128i high_codes(__m128i bytes) { return _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15)); }
QLORA_INLINE __m128i low_codes(__m128i bytes) { return _mm_and_si128(bytes, _mm_set1_epi8(15)); }

// Columns n0 to n0 + 31, the sum over k: k0 to k0 + 32 blocks, k0 a multiple of 32.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_k(const Nf4Matrix& w, int64_t n0, int64_t k0, int64_t blocks, float* const room_of_strip) {
  float* strip = room_of_strip;
  const Table16 levels(w.levels);
  const int64_t np = pieces_of(w.n, kStrip) * kStrip;
  alignas(64) float room[kStrip];
  for (int64_t b = 0; b < blocks; ++b, strip += kTile * kDwordsOfTwo<is_bf16>) {
    const int64_t k = k0 + b * kBlock;
    const float* scales = scales_of(w, k / w.block, n0, kStrip, room);
    const uint8_t* codes = w.codes + (k / kBlock * (np / kTile) + n0 / kTile) * kTile * kTile;
    for (int half = 0; half < kStrip; half += kTile, codes += kTile * kTile)
      for (int pair = 0; pair < kTile; ++pair) {
        const __m128i bytes = load16(codes + pair * kTile), high = high_codes(bytes), low = low_codes(bytes);
        float* const to = strip + pair * kDwordsOfTwo<is_bf16> + half;
        for (int i = 0; i < kTile; i += Vec::width) {
          const Vec scale = load(scales + half + i);
          store_two<is_bf16>(to + i, mul(levels.of(high, i), scale), mul(levels.of(low, i), scale));
        }
      }
  }
  return room_of_strip;
}

// Columns k0 to k0 + 31, k0 a multiple of 32, the sum over n: n0 to n0 + 32 blocks, n0 a multiple of 32.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_n(const Nf4Matrix& w, int64_t k0, int64_t n0, int64_t blocks, float* const room_of_strip) {
  float* strip = room_of_strip;
  const Table16 levels(w.levels);
  const int64_t np = pieces_of(w.n, kStrip) * kStrip;
  alignas(64) float room[kBlock];
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n = n0 + b * kBlock;
    const float* scales = scales_of(w, k0 / w.block, n, kBlock, room);
    const uint8_t* codes = w.codes + (k0 / kBlock * (np / kTile) + n / kTile) * kTile * kTile;
    for (int half = 0; half < kBlock; half += kTile, codes += kTile * kTile) {
      __m128i rows[kTile];  // of 16 pairs of k; after the transposition, one for each n
      for (int pair = 0; pair < kTile; ++pair) rows[pair] = load16(codes + pair * kTile);
      transpose16(rows);
      for (int i = 0; i < kTile; i += 2, strip += kDwordsOfTwo<is_bf16>) {
        const Vec even = set1(scales[half + i]), odd = set1(scales[half + i + 1]);
        const __m128i h0 = high_codes(rows[i]), l0 = low_codes(rows[i]);
        const __m128i h1 = high_codes(rows[i + 1]), l1 = low_codes(rows[i + 1]);
        const __m128i codes0[2] = {_mm_unpacklo_epi8(h0, l0), _mm_unpackhi_epi8(h0, l0)};
        const __m128i codes1[2] = {_mm_unpacklo_epi8(h1, l1), _mm_unpackhi_epi8(h1, l1)};
        for (int part = 0; part < 2; ++part)
          for (int j = 0; j < kTile; j += Vec::width)
            store_two<is_bf16>(strip + part * kTile + j, mul(levels.of(codes0[part], j), even),
                               mul(levels.of(codes1[part], j), odd));
      }
    }
  }
  return room_of_strip;
}

}  // namespace qlora::QLORA_TIER
