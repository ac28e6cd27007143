// The innermost products: some rows of packed activations times a strip.
//
// Packed activations are pieces of 64 bytes, 16 dwords: a row's values at 16 steps of the sum (a float each, or two bf16).
// A block of `rows` rows is [pieces][rows][16 dwords], so that each piece of all its rows lies together, at offsets known
// when this is compiled, and as the tile unit wants its left operand.
//
// Each gives sums (rows, 32), or only the first columns of them: += if `accumulate`, else =. A row's sum does not depend on the rows beside it.
#pragma once
#include "simd.hpp"
#include "strip.hpp"
#include "tiles.hpp"

namespace qlora::QLORA_TIER {

constexpr int kPiece = 16;  // dwords, and steps

// Products of floats: one fused multiply-add a step.
struct Floats {
  static constexpr bool is_bf16 = false;
#ifdef __AVX512F__
  static constexpr int rows = 14;  // x 2 vectors of sums, in 28 of 32 registers
#else
  static constexpr int rows = 6;  // x 2 vectors of sums, in 12 of 16 registers
#endif
  static constexpr int64_t chunk = 192;  // steps of a strip that is multiplied with before the next: 24 KiB

  static QLORA_INLINE Vec step(float a, Vec b, Vec sum) { return fma(set1(a), b, sum); }
};

#ifdef __AVX512BF16__
// Products of bf16 with float sums: one dot product of two a step.
struct Dots {
  static constexpr bool is_bf16 = true;
  static constexpr int rows = 14;
  static constexpr int64_t chunk = 192;

  static QLORA_INLINE Vec step(float a, Vec b, Vec sum) {
    const __m512i pair = _mm512_castps_si512(_mm512_set1_ps(a));
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(b.v))};
  }
};
#endif

// The same products in blocks of R rows.
template <class Products, int R>
struct InRows : Products {
  static constexpr int rows = R;
};

// R rows and V vectors of columns, held in registers over all steps. They are summed apart from what was there before:
// sums of sums round less than one long sum.
template <class Products, int R, int V>
QLORA_INLINE void registers(const float* a, const float* strip, int64_t pieces, float* sums, bool accumulate) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) sum[i][j] = zero();
  for (int64_t piece = 0; piece < pieces; ++piece, a += (Products::rows - 1) * kPiece)
#pragma GCC unroll 4
    for (int s = 0; s < kPiece; ++s, ++a, strip += kStrip) {
      Vec b[V];
      for (int j = 0; j < V; ++j) b[j] = load(strip + j * Vec::width);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) sum[i][j] = Products::step(a[i * kPiece], b[j], sum[i][j]);
    }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) {
      float* const to = sums + i * kStrip + j * Vec::width;
      store(to, accumulate ? add(load(to), sum[i][j]) : sum[i][j]);
    }
}

// The first `rows` rows of a block, or one more: rows come in twos, so that there are half as many variants. Of the strip
// the first `columns`, or some more.
template <class Products, int R>
inline void vector_block(const float* a, const float* strip, int64_t pieces, float* sums, int rows, int64_t columns,
                         bool accumulate) {
  if constexpr (R > 2) {
    if (rows <= R - 2) return vector_block<Products, R - 2>(a, strip, pieces, sums, rows, columns, accumulate);
  }
  int64_t column = 0;
  for (; column + Vec::width < columns; column += 2 * Vec::width)
    registers<Products, R, 2>(a, strip + column, pieces, sums + column, accumulate);
  if (column < columns) registers<Products, R, 1>(a, strip + column, pieces, sums + column, accumulate);
}

template <class Products>
struct VectorUnit : Products {
  QLORA_INLINE void multiply(const float* a, const float* strip, int64_t pieces, float* sums, int rows, int64_t columns,
                             bool accumulate) {
    vector_block<Products, Products::rows>(a, strip, pieces, sums, rows, columns, accumulate);
  }
};

#ifdef QLORA_TILES
// Products of bf16 with float sums on the tile unit: 2 x 2 tiles of sums, 16 steps at once. The activations are loaded
// with the hint that they stream: the strip stays in first-level cache then.
struct TileUnit {
  static constexpr bool is_bf16 = true;
  static constexpr int rows = 32;
  static constexpr int64_t chunk = 288;  // steps: 36 KiB

  Tiles tiles;

  QLORA_INLINE void multiply(const float* a, const float* strip, int64_t pieces, float* sums, int rows_of, int64_t columns,
                             bool accumulate) {
    constexpr int64_t piece = 64, line = kStrip * sizeof(float), half = 16;  // bytes, bytes, rows or columns
    const bool both = rows_of > half, wide = columns > half;
    if (accumulate) {
      tiles.load<0>(sums, line);
      if (wide) tiles.load<1>(sums + half, line);
      if (both) tiles.load<2>(sums + half * kStrip, line);
      if (both && wide) tiles.load<3>(sums + half * kStrip + half, line);
    } else {
      tiles.zero<0>();
      tiles.zero<1>();
      tiles.zero<2>();
      tiles.zero<3>();
    }
    for (; pieces; --pieces, a += rows * kPiece, strip += kPiece * kStrip) {
      tiles.stream<4>(a, piece);
      tiles.load<6>(strip, line);
      if (wide) tiles.load<7>(strip + half, line);
      tiles.multiply<0, 4, 6>();
      if (wide) tiles.multiply<1, 4, 7>();
      if (!both) continue;
      tiles.stream<5>(a + half * kPiece, piece);
      tiles.multiply<2, 5, 6>();
      if (wide) tiles.multiply<3, 5, 7>();
    }
    tiles.store<0>(sums, line);
    if (wide) tiles.store<1>(sums + half, line);
    if (both) tiles.store<2>(sums + half * kStrip, line);
    if (both && wide) tiles.store<3>(sums + half * kStrip + half, line);
  }
};
#endif

}  // namespace qlora::QLORA_TIER
