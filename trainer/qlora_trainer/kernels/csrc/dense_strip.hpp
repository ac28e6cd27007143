// Strips (nf4_strip.hpp) of matrices that are not quantized: LoRA's, and activations whose rows are summed over.
#pragma once
#include "nf4_strip.hpp"

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
    for (int j = 0; j < kStrip; j += Vec::width) store_two<is_bf16>(strip + j, load(two[0] + j), load(two[1] + j));
  }
}

}  // namespace qlora::QLORA_TIER
