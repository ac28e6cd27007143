// Dropout by a counter-based generator, Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
// what an element gets is a function of a key, its row and its column, whoever computes it and how often.
#pragma once
#include "elementwise.hpp"

namespace qlora::QLORA_TIER {

// Lanes of 64 bits; the low 32 count.
#ifdef __AVX512F__
struct Lanes {
  static constexpr int width = 8;
  __m512i v;
};
QLORA_INLINE Lanes all_lanes(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
QLORA_INLINE Lanes counting_from(uint64_t x) {
  return {_mm512_add_epi64(all_lanes(x).v, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
}
QLORA_INLINE Lanes product(Lanes a, Lanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
QLORA_INLINE Lanes upper(Lanes a) { return {_mm512_srli_epi64(a.v, 32)}; }
QLORA_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm512_xor_si512(a.v, _mm512_xor_si512(b.v, c.v))}; }
QLORA_INLINE void store_words(uint32_t* p, Lanes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a.v)); }
// a where the word is at least the threshold, else 0.
QLORA_INLINE Vec kept(Vec a, const uint32_t* words, uint32_t threshold) {
  const __m512i bound = _mm512_set1_epi32(static_cast<int>(threshold));
  return {_mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), bound), a.v)};
}
#else
struct Lanes {
  static constexpr int width = 4;
  __m256i v;
};
QLORA_INLINE Lanes all_lanes(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
QLORA_INLINE Lanes counting_from(uint64_t x) { return {_mm256_add_epi64(all_lanes(x).v, _mm256_setr_epi64x(0, 1, 2, 3))}; }
QLORA_INLINE Lanes product(Lanes a, Lanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
QLORA_INLINE Lanes upper(Lanes a) { return {_mm256_srli_epi64(a.v, 32)}; }
QLORA_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return {_mm256_xor_si256(a.v, _mm256_xor_si256(b.v, c.v))}; }
QLORA_INLINE void store_words(uint32_t* p, Lanes a) {
  const __m256i low = _mm256_permutevar8x32_epi32(a.v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(low));
}
// a where the word is at least the threshold, else 0.
QLORA_INLINE Vec kept(Vec a, const uint32_t* words, uint32_t threshold) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int>(threshold));
  const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i keep = _mm256_cmpeq_epi32(_mm256_max_epu32(word, bound), word);
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(keep))};
}
#endif

// The random words of columns 64 group to 64 group + 63 of a row. Counter (16 group + j, row, 0, 0) gives column 16 w + j
// its word w, so that a vector of counters gives columns side by side.
QLORA_INLINE void random_words(uint64_t key, int64_t row, int64_t group, uint32_t* words) {
  const Lanes m0 = all_lanes(0xD2511F53u), m1 = all_lanes(0xCD9E8D57u);
  for (int j = 0; j < 16; j += Lanes::width) {
    Lanes x[4] = {counting_from(static_cast<uint64_t>(16 * group + j)), all_lanes(static_cast<uint64_t>(row)), all_lanes(0), all_lanes(0)};
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const Lanes p0 = product(x[0], m0), p1 = product(x[2], m1);
      x[0] = exclusive_or(upper(p1), x[1], all_lanes(k0));
      x[2] = exclusive_or(upper(p0), x[3], all_lanes(k1));
      x[1] = p1;
      x[3] = p0;
    }
    for (int w = 0; w < 4; ++w) store_words(words + 16 * w + j, x[w]);
  }
}

// y = mask x, or y += mask x; mask is `factor` where an element is kept, else 0. Product and sum are rounded to fp32,
// and the result to T.
template <class T>
inline void dropout(const T* x, T* y, uint64_t key, uint32_t threshold, float factor, int64_t begin, int64_t end, int64_t columns,
                    bool add_to) {
  const Vec scale = set1(factor);
  for (int64_t row = begin; row < end; ++row) {
    const T* from = x + row * columns;
    T* to = y + row * columns;
    for (int64_t start = 0; start < columns; start += 64) {
      uint32_t words[64];
      random_words(key, row, start / 64, words);
      each_vector(least(int64_t{64}, columns - start), [&](int64_t i, auto at) {
        const Vec masked = kept(mul(at.load(from + start + i), scale), words + i, threshold);
        at.store(to + start + i, add_to ? add(at.load(to + start + i), masked) : masked);
      });
    }
  }
}

inline void dropout_of(int type, const void* x, void* y, uint64_t key, uint32_t threshold, float factor, int64_t begin, int64_t end,
                       int64_t columns, bool add_to) {
  if (type == kBf16)
    dropout(static_cast<const bf16*>(x), static_cast<bf16*>(y), key, threshold, factor, begin, end, columns, add_to);
  else
    dropout(static_cast<const float*>(x), static_cast<float*>(y), key, threshold, factor, begin, end, columns, add_to);
}

}  // namespace qlora::QLORA_TIER
