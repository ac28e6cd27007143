// y = x W^T + bias and y = x W for W in NF4, which is never whole in memory.
//
// Both are one product, (rows, depth) x (depth, columns). Columns are cut into strips of 32, which threads share; the sum
// is never cut between threads, so that their number changes no bit. In order:
//   for each panel of rows, as many as first- and second-level cache like
//     for each 4 KiB of a row of x: pack the panel (multiply.hpp)
//       for each strip: for each chunk of the sum: dequantize it into first-level cache, multiply all rows with it
// A strip is dequantized once for each panel, which is a few percent of the work at some hundred rows.
#pragma once
#include "multiply.hpp"
#include "threads.hpp"

namespace qlora::QLORA_TIER {

constexpr int64_t kPanelRows = 512, kPanelBytes = 1 << 20, kRowBytes = 4096;

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

// Sums (rows, 32) -> y, the first `columns`, with the bias added.
template <class Y>
QLORA_INLINE void finish(const float* sums, int64_t rows, int64_t columns, const Y* bias, Y* y, int64_t stride) {
  alignas(64) float added[kStrip] = {};
  if (bias) {
    alignas(64) Y filled[kStrip] = {};
    __builtin_memcpy(filled, bias, static_cast<size_t>(columns) * sizeof(Y));
    for (int i = 0; i < kStrip; i += Vec::width) store(added + i, load(filled + i));
  }
  for (int64_t row = 0; row < rows; ++row, sums += kStrip, y += stride) {
    alignas(64) Y last[kStrip];
    Y* const to = columns == kStrip ? y : last;
    for (int i = 0; i < kStrip; i += Vec::width)
      store_normal(to + i, bias ? add(load(sums + i), load(added + i)) : load(sums + i));
    if (columns < kStrip) __builtin_memcpy(y, last, static_cast<size_t>(columns) * sizeof(Y));
  }
}

template <class Unit, class X>
bool product(const LinearCall& call) {
  if (call.rows == 0) return true;
  const Nf4Matrix& w = *call.weight;
  const int64_t depth = call.transposed ? w.n : w.k, columns = call.transposed ? w.k : w.n;
  const int64_t strips = pieces_of(columns, kStrip), blocks = pieces_of(depth, kBlock);
  const auto* const x = static_cast<const X*>(call.x);
  const auto* const bias = static_cast<const X*>(call.bias);
  auto* const y = static_cast<X*>(call.y);

  // Everything in blocks of 32 indices of the sum: each is `steps` steps, and so many bytes of a packed row.
  constexpr int64_t steps = Unit::is_bf16 ? kBlock / 2 : kBlock, bytes = steps * sizeof(float);
  const int64_t parts = pieces_of(blocks * bytes, kRowBytes), part_blocks = pieces_of(blocks, parts);
  const int64_t chunks = pieces_of(part_blocks * steps, Unit::chunk), chunk_blocks = pieces_of(part_blocks, chunks);
  const int64_t fit = least(kPanelRows, kPanelBytes / (part_blocks * bytes));
  const int64_t panels = pieces_of(call.rows, fit);
  const int64_t row_blocks = pieces_of(pieces_of(call.rows, panels), Unit::rows);
  const int64_t panel = row_blocks * Unit::rows;

  // The sums of all strips are kept from one part of the sum to the next, where there is more than one.
  auto* const packed = static_cast<float*>(scratch(Slot::call, panel * part_blocks * bytes));
  float* kept = nullptr;
  if (parts > 1) kept = static_cast<float*>(scratch(Slot::pass, strips * panel * kStrip * sizeof(float)));
  if (!packed || (parts > 1 && !kept)) return false;
  bool memory = true;

  for (int64_t row = 0; row < call.rows; row += panel) {
    const int64_t rows = least(panel, call.rows - row);
    for (int64_t part = 0; part < blocks; part += part_blocks) {
      const int64_t here = least(part_blocks, blocks - part), pieces = here * steps / kPiece;
      parallel_for(call.threads, pieces_of(rows, Unit::rows), [&](int64_t first, int64_t last) {
        pack<Unit>(x + row * depth + part * kBlock, depth, rows, depth - part * kBlock, pieces, first, last, packed);
      });
      parallel_for(call.threads, strips, [&](int64_t first, int64_t last) {
        auto* const strip = static_cast<float*>(scratch(Slot::strip, chunk_blocks * steps * kStrip * sizeof(float)));
        auto* sums = kept ? kept : static_cast<float*>(scratch(Slot::sums, panel * kStrip * sizeof(float)));
        if (!strip || !sums) {
          __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
          return;
        }
        const DenormalsAreZero mode;
        Unit unit;
        for (int64_t s = first; s < last; ++s) {
          if (kept) sums = kept + s * panel * kStrip;
          for (int64_t chunk = 0; chunk < here; chunk += chunk_blocks) {
            const int64_t length = least(chunk_blocks, here - chunk), start = (part + chunk) * kBlock;
            if (call.transposed)
              strip_over_n<Unit::is_bf16>(w, s * kStrip, start, length, strip);
            else
              strip_over_k<Unit::is_bf16>(w, s * kStrip, start, length, strip);
            for (int64_t r = 0; r < rows; r += Unit::rows)
              unit.multiply(packed + (r * pieces + chunk * steps / kPiece * Unit::rows) * kPiece, strip,
                            length * steps / kPiece, sums + r * kStrip, static_cast<int>(least<int64_t>(Unit::rows, rows - r)),
                            part + chunk > 0);
          }
          if (part + here < blocks) continue;
          finish(sums, rows, least<int64_t>(kStrip, columns - s * kStrip), bias ? bias + s * kStrip : nullptr,
                 y + row * columns + s * kStrip, columns);
        }
      });
    }
  }
  return memory;
}

inline bool nf4_linear(const LinearCall& call) {
  if (!call.is_bf16) return product<VectorUnit<Floats>, float>(call);
#ifdef QLORA_TILES
  return product<TileUnit, bf16>(call);
#elif defined(__AVX512BF16__)
  return product<VectorUnit<Dots>, bf16>(call);
#else
  return product<VectorUnit<Floats>, bf16>(call);
#endif
}

}  // namespace qlora::QLORA_TIER
