// Rows of activations as the innermost products want them (multiply.hpp).
#pragma once
#include "multiply.hpp"

namespace qlora::QLORA_TIER {

// One row's `count` values, 0 to 16 or 32, as a piece.
template <bool is_bf16, class X>
QLORA_INLINE void pack_piece(const X* x, int64_t count, float* piece) {
  constexpr int64_t whole = is_bf16 ? 2 * kPiece : kPiece;
  X filled[whole];
  if (count < whole) {
    __builtin_memset(filled, 0, sizeof filled);
    if (count > 0) __builtin_memcpy(filled, x, static_cast<size_t>(count) * sizeof(X));
    x = filled;
  }
  if constexpr (is_bf16)
    __builtin_memcpy(piece, x, 64);
  else
    for (int i = 0; i < kPiece; i += Vec::width) store(piece + i, load(x + i));
}

// Blocks `first` to `last` of a panel (rows, depth), of which `depth` columns are packed, filled up with zeros.
template <class Unit, class X>
QLORA_INLINE void pack(const X* x, int64_t stride, int64_t rows, int64_t depth, int64_t pieces, int64_t first, int64_t last,
                       float* packed) {
  constexpr int64_t values = Unit::is_bf16 ? 2 * kPiece : kPiece;
  for (int64_t block = first; block < last; ++block) {
    float* const to = packed + block * pieces * Unit::rows * kPiece;
    for (int64_t i = 0; i < Unit::rows; ++i) {
      const int64_t row = block * Unit::rows + i;
      for (int64_t p = 0; p < pieces; ++p)
        pack_piece<Unit::is_bf16>(x + row * stride + p * values, row < rows ? least(depth - p * values, values) : 0,
                                  to + (p * Unit::rows + i) * kPiece);
    }
  }
}

}  // namespace qlora::QLORA_TIER
