// Strips (strip.hpp) of matrices that are not quantized: LoRA's, activations whose rows are summed over, and weights.
#pragma once
#include "strip.hpp"
#include "tier.hpp"

namespace qlora::QLORA_TIER {

// Indices `first` to `first` + 32 blocks of the sum. element(index, column) is a float; those beyond `depth` and
// `columns` are 0.
template <bool is_bf16, class Element>
QLORA_INLINE void dense_strip(Element element, int64_t first, int64_t blocks, int64_t depth, int64_t columns, float* strip) {
  alignas(64) float two[2][kStrip];
  for (int64_t index = first; index < first + blocks * kBlock; index += 2, strip += kDwordsOfTwo<is_bf16>) {
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t column = 0; column < kStrip; ++column)
        two[i][column] = index + i < depth && column < columns ? element(index + i, column) : 0.0f;
    for (int j = 0; j < kStrip; j += Vec::width) store_two<is_bf16>(strip + j, load(two[0] + j), load(two[1] + j));
  }
}

// Rows `first` to `first` + 32 blocks of x (rows, stride), 32 columns of it or the first `columns`, as indices of the sum;
// rows beyond `rows` and columns beyond `columns` are 0.
template <bool is_bf16, class X>
QLORA_INLINE void strip_over_rows(const X* x, int64_t stride, int64_t first, int64_t blocks, int64_t rows, int64_t columns,
                                  float* strip) {
  alignas(64) X filled[2][kStrip];
  for (int64_t row = first; row < first + blocks * kBlock; row += 2, strip += kDwordsOfTwo<is_bf16>) {
    const X* two[2] = {x + row * stride, x + (row + 1) * stride};
    for (int i = 0; i < 2; ++i)
      if (columns < kStrip || row + i >= rows) {
        __builtin_memset(filled[i], 0, sizeof filled[i]);
        if (row + i < rows) __builtin_memcpy(filled[i], two[i], static_cast<size_t>(columns) * sizeof(X));
        two[i] = filled[i];
      }
    for (int j = 0; j < kStrip; j += Vec::width) {
      if constexpr (is_bf16 && sizeof(X) == sizeof(bf16))
        store_pairs(strip + j, two[0] + j, two[1] + j);
      else
        store_two<is_bf16>(strip + j, load(two[0] + j), load(two[1] + j));
    }
  }
}

// Numbers of a weight from column n0 and index k0 on, both multiples of 32.
template <class X>
QLORA_INLINE const X* numbers_of(const DenseMatrix& w, int64_t n0, int64_t k0) {
  return static_cast<const X*>(w.numbers) + n0 * pieces_of(w.k, kBlock) * kBlock + k0 * kStrip;
}

// A strip of one type as the other: `blocks` blocks.
template <bool is_bf16>
QLORA_INLINE void convert(const float* dwords, int64_t blocks, float* strip) {
  for (int64_t two = 0; two < blocks * kBlock / 2; ++two, strip += kDwordsOfTwo<is_bf16>, dwords += kDwordsOfTwo<!is_bf16>)
    for (int j = 0; j < kStrip; j += Vec::width) {
      Vec even, odd;
      if constexpr (is_bf16) {
        even = load(dwords + j);
        odd = load(dwords + kStrip + j);
      } else {
        load_pairs(dwords + j, even, odd);
      }
      store_two<is_bf16>(strip + j, even, odd);
    }
}

// Columns n0 to n0 + 31, the sum over k: k0 to k0 + 32 blocks. Of the type that is computed in, it lies there already.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_k(const DenseMatrix& w, int64_t n0, int64_t k0, int64_t blocks, float* const room) {
  const auto* dwords = w.is_bf16 ? reinterpret_cast<const float*>(numbers_of<bf16>(w, n0, k0)) : numbers_of<float>(w, n0, k0);
  if (w.is_bf16 == is_bf16) return dwords;
  convert<is_bf16>(dwords, blocks, room);
  return room;
}

// A block of 32 n x 32 k, k along its columns.
template <bool is_bf16, class X>
QLORA_INLINE void block_over_n(const DenseMatrix& w, int64_t k0, int64_t n0, float* strip) {
  constexpr int64_t dwords = kBlock * sizeof(X) / sizeof(float);  // of a column of the block
  const auto* const block = reinterpret_cast<const float*>(numbers_of<X>(w, n0, k0));
  alignas(64) float turned[kStrip * dwords];
  for (int64_t i = 0; i < dwords; i += Vec::width)
    for (int64_t j = 0; j < kStrip; j += Vec::width) transpose(block + i * kStrip + j, kStrip, turned + j * dwords + i, dwords);
  strip_over_rows<is_bf16>(reinterpret_cast<const X*>(turned), kBlock, 0, 1, kStrip, kBlock, strip);
}

// Columns k0 to k0 + 31, the sum over n: n0 to n0 + 32 blocks, both multiples of 32.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_n(const DenseMatrix& w, int64_t k0, int64_t n0, int64_t blocks, float* const room) {
  constexpr int64_t made = kBlock / 2 * kDwordsOfTwo<is_bf16>;  // dwords of a block
  for (int64_t b = 0; b < blocks; ++b) {
    if (w.is_bf16)
      block_over_n<is_bf16, bf16>(w, k0, n0 + b * kBlock, room + b * made);
    else
      block_over_n<is_bf16, float>(w, k0, n0 + b * kBlock, room + b * made);
  }
  return room;
}

// Rows of x (rows, depth), `stride` apart: the first 32 become the columns of a strip, `blocks` blocks of it. What is
// beyond `rows` and `depth` is 0.
template <bool is_bf16, class X>
QLORA_INLINE void strip_over_columns(const X* x, int64_t stride, int64_t rows, int64_t depth, int64_t blocks, float* strip) {
  constexpr int64_t numbers = sizeof(float) / sizeof(X), dwords = kBlock / numbers;  // of a dword, and of a row of a block
  constexpr bool converts = is_bf16 != (sizeof(X) == sizeof(bf16));
  rows = least<int64_t>(rows, kStrip);
  alignas(64) X filled[kStrip * kBlock];
  alignas(64) float turned[dwords * kStrip];
  for (int64_t b = 0; b < blocks; ++b, x += kBlock, depth -= kBlock, strip += kBlock / 2 * kDwordsOfTwo<is_bf16>) {
    const X* block = x;
    int64_t row = stride;
    // The last rows and columns are filled up. Where rows of bf16 are odd, every other one begins within a dword.
    if (const int64_t columns = least<int64_t>(kBlock, depth); rows < kStrip || columns < kBlock || stride % numbers) {
      __builtin_memset(filled, 0, sizeof filled);
      for (int64_t i = 0; i < rows && columns > 0; ++i)
        __builtin_memcpy(filled + i * kBlock, x + i * stride, static_cast<size_t>(columns) * sizeof(X));
      block = filled;
      row = kBlock;
    }
    float* const to = converts ? turned : strip;
    for (int64_t i = 0; i < dwords; i += Vec::width)
      for (int64_t j = 0; j < kStrip; j += Vec::width)
        transpose(reinterpret_cast<const float*>(block + j * row) + i, row / numbers, to + i * kStrip + j, kStrip);
    if constexpr (converts) convert<is_bf16>(turned, 1, strip);
  }
}

// Columns n0 to n0 + 31, the sum over k: k0 to k0 + 32 blocks.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_k(const RowMajorMatrix& w, int64_t n0, int64_t k0, int64_t blocks, float* const room) {
  const int64_t from = n0 * w.k + k0;
  if (w.is_bf16)
    strip_over_columns<is_bf16>(static_cast<const bf16*>(w.numbers) + from, w.k, w.n - n0, w.k - k0, blocks, room);
  else
    strip_over_columns<is_bf16>(static_cast<const float*>(w.numbers) + from, w.k, w.n - n0, w.k - k0, blocks, room);
  return room;
}

// Columns k0 to k0 + 31, the sum over n: n0 to n0 + 32 blocks.
template <bool is_bf16>
QLORA_INLINE const float* strip_over_n(const RowMajorMatrix& w, int64_t k0, int64_t n0, int64_t blocks, float* const room) {
  const int64_t columns = least<int64_t>(kStrip, w.k - k0);
  if (w.is_bf16)
    strip_over_rows<is_bf16>(static_cast<const bf16*>(w.numbers) + k0, w.k, n0, blocks, w.n, columns, room);
  else
    strip_over_rows<is_bf16>(static_cast<const float*>(w.numbers) + k0, w.k, n0, blocks, w.n, columns, room);
  return room;
}

}  // namespace qlora::QLORA_TIER
