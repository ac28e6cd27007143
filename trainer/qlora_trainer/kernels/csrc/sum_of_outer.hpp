// y = factor x^T u, the gradients of LoRA's matrices: a sum over rows, many of them, to a few columns.
//
// Again one product with strips, of x, in columns of 32 that threads share; u is the packed operand, with `rank` rows.
#pragma once
#include "dense_strip.hpp"
#include "multiply.hpp"
#include "threads.hpp"

namespace qlora::QLORA_TIER {

// The dword of one step of a sum over rows: two bf16 as they are, or one as a float.
template <bool is_bf16>
QLORA_INLINE float step_of(const bf16* u, const bf16* next) {
  const uint32_t low = u->bits, high = next ? next->bits : 0, bits = is_bf16 ? low | high << 16 : low << 16;
  float step;
  __builtin_memcpy(&step, &bits, sizeof step);
  return step;
}

// u (rows, rank) -> u^T packed (multiply.hpp): `pieces` of 16 steps of the sum, filled up with zeros.
template <class Unit, class X>
QLORA_INLINE void pack_transposed(const X* u, int64_t rows, int64_t rank, int64_t pieces, float* packed) {
  constexpr int64_t per_step = Unit::is_bf16 ? 2 : 1;
  __builtin_memset(packed, 0, static_cast<size_t>(pieces_of(rank, Unit::rows) * Unit::rows * pieces * kPiece) * sizeof(float));
  for (int64_t first = 0; first < rank; first += Unit::rows, packed += pieces * Unit::rows * kPiece) {
    const int64_t here = least<int64_t>(Unit::rows, rank - first);
    for (int64_t row = 0; row < rows; row += per_step) {
      const int64_t step = row / per_step;
      float* to = packed + step / kPiece * Unit::rows * kPiece + step % kPiece;
      const X* const from = u + row * rank + first;
      const X* const next = per_step == 2 && row + 1 < rows ? from + rank : nullptr;
      for (int64_t j = 0; j < here; ++j, to += kPiece) {
        if constexpr (sizeof(X) == sizeof(float))
          *to = from[j];
        else
          *to = step_of<Unit::is_bf16>(from + j, next ? next + j : nullptr);
      }
    }
  }
}

template <class Unit, class X>
bool outer_product(const SumOfOuterCall& call) {
  const auto* const x = static_cast<const X*>(call.x);
  constexpr int64_t steps = Unit::is_bf16 ? kBlock / 2 : kBlock;
  const int64_t blocks = pieces_of(call.rows, kBlock), pieces = blocks * steps / kPiece;
  const int64_t chunk_blocks = least<int64_t>(Unit::chunk / steps, blocks > 0 ? blocks : 1);
  const int64_t rank = pieces_of(call.rank, Unit::rows) * Unit::rows;
  auto* const packed = static_cast<float*>(scratch(Slot::call, static_cast<size_t>(rank * (pieces + 1) * kPiece) * sizeof(float)));
  if (!packed) return false;
  pack_transposed<Unit>(static_cast<const X*>(call.u), call.rows, call.rank, pieces, packed);
  bool memory = true;
  parallel_for(call.threads, pieces_of(call.columns, kStrip), [&](int64_t first, int64_t last) {
    auto* const strip = static_cast<float*>(scratch(Slot::strip, static_cast<size_t>(chunk_blocks * steps * kStrip) * sizeof(float)));
    auto* const sums = static_cast<float*>(scratch(Slot::sums, static_cast<size_t>(rank * kStrip) * sizeof(float)));
    if (!strip || !sums) {
      __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
      return;
    }
    const DenormalsAreZero mode;
    Unit unit;
    for (int64_t s = first; s < last; ++s) {
      const int64_t columns = least<int64_t>(kStrip, call.columns - s * kStrip);
      if (blocks == 0) __builtin_memset(sums, 0, static_cast<size_t>(rank * kStrip) * sizeof(float));
      for (int64_t chunk = 0; chunk < blocks; chunk += chunk_blocks) {
        const int64_t length = least(chunk_blocks, blocks - chunk);
        strip_over_rows<Unit::is_bf16>(x + s * kStrip, call.columns, chunk * kBlock, length, call.rows, columns, strip);
        for (int64_t r = 0; r < call.rank; r += Unit::rows)
          unit.multiply(packed + (r * pieces + chunk * steps / kPiece * Unit::rows) * kPiece, strip, length * steps / kPiece,
                        sums + r * kStrip, static_cast<int>(least<int64_t>(Unit::rows, call.rank - r)), columns, chunk > 0);
      }
      for (int64_t r = 0; r < call.rank; ++r)
        for (int64_t column = 0; column < columns; ++column) {
          const int64_t c = s * kStrip + column;
          call.y[call.transposed ? r * call.columns + c : c * call.rank + r] = call.factor * sums[r * kStrip + column];
        }
    }
  });
  return memory;
}

inline bool sum_of_outer(const SumOfOuterCall& call) {
  // Ranks are multiples of 8, mostly.
  constexpr int rows = Floats::rows >= 8 ? 8 : 4;
  if (!call.is_bf16) return outer_product<VectorUnit<InRows<Floats, rows>>, float>(call);
#ifdef QLORA_TILES
  return outer_product<TileUnit, bf16>(call);
#elif defined(__AVX512BF16__)
  return outer_product<VectorUnit<InRows<Dots, rows>>, bf16>(call);
#else
  return outer_product<VectorUnit<InRows<Floats, rows>>, bf16>(call);
#endif
}

}  // namespace qlora::QLORA_TIER
