// y = x W^T + bias and y = x W, with LoRA's products beside them. W is kept in one of several forms; what is quantized is
// never whole in memory.
//
// Both are one product, (rows, depth) x (depth, columns). Columns are cut into strips of 32, which threads share; the sum
// is never cut between threads, so that their number changes no bit. In order:
//   for each panel of rows, as many as first- and second-level cache like
//     for each 4 KiB of a row of x: pack the panel (multiply.hpp)
//       for each strip: for each chunk of the sum: make it in first-level cache, multiply all rows with it
// A strip is made once for each panel, which is a few percent of the work at some hundred rows.
//
// A product of low rank is more of the same: LoRA's first matrix is a strip or some more, which a packed panel is
// multiplied with at once; what comes out is packed as 32 more indices of the sum, or some more, for which each strip
// has the second matrix. So it costs no pass over x or y, and y is rounded once.
#pragma once
#include "dense_strip.hpp"
#include "int8_strip.hpp"
#include "multiply.hpp"
#include "nf4_strip.hpp"
#include "pack.hpp"
#include "threads.hpp"

namespace qlora::QLORA_TIER {

constexpr int64_t kPanelRows = 512, kPanelBytes = 1 << 20, kRowBytes = 4096;

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

// The elements of LoRA's two matrices as a call multiplies with them: the first is (depth, rank), the second (rank, columns).
struct LowRankElements {
  const LowRank& l;
  bool transposed;
  int64_t k;

  QLORA_INLINE float a(int64_t r, int64_t i) const { return l.a[r * k + i]; }
  QLORA_INLINE float b(int64_t i, int64_t r) const { return l.scale * l.b[i * l.rank + r]; }
  QLORA_INLINE float first(int64_t i, int64_t r) const { return transposed ? b(i, r) : a(r, i); }
  QLORA_INLINE float second(int64_t r, int64_t i) const { return transposed ? a(r, i) : b(i, r); }
};

// A weight (n, k) as a product sees it: what makes strips of it, in either direction.
struct StripMaker {
  using Make = const float*(const void* weight, int64_t column, int64_t start, int64_t blocks, float* room);
  const void* weight;
  int64_t n, k;
  Make *over_k, *over_n;
};

template <bool is_bf16, class Weight>
StripMaker maker_for(const void* weight) {
  const auto& w = *static_cast<const Weight*>(weight);
  return {weight, w.n, w.k,
          [](const void* of, int64_t column, int64_t start, int64_t blocks, float* room) {
            return strip_over_k<is_bf16>(*static_cast<const Weight*>(of), column, start, blocks, room);
          },
          [](const void* of, int64_t column, int64_t start, int64_t blocks, float* room) {
            return strip_over_n<is_bf16>(*static_cast<const Weight*>(of), column, start, blocks, room);
          }};
}

template <bool is_bf16>
StripMaker maker_for(const LinearCall& call) {
  if (call.form == kInt8) return maker_for<is_bf16, Int8Matrix>(call.weight);
  if (call.form == kDense) return maker_for<is_bf16, DenseMatrix>(call.weight);
  if (call.form == kRowMajor) return maker_for<is_bf16, RowMajorMatrix>(call.weight);
  return maker_for<is_bf16, Nf4Matrix>(call.weight);
}

template <class Unit, class X>
bool product(const LinearCall& call) {
  if (call.rows == 0) return true;
  const StripMaker w = maker_for<Unit::is_bf16>(call);
  StripMaker::Make* const make_strip = call.transposed ? w.over_n : w.over_k;
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

  const LowRank none = {};
  const LowRank& low = call.low_rank ? *call.low_rank : none;
  const LowRankElements elements{low, call.transposed, w.k};
  const int64_t inner_strips = call.low_rank && !low.inner_given ? pieces_of(low.rank, kStrip) : 0;
  const int64_t inner_blocks = call.low_rank && low.added ? pieces_of(low.rank, kBlock) : 0;
  const int64_t inner_pieces = inner_blocks ? pieces_of(low.rank, Unit::is_bf16 ? 2 * kPiece : kPiece) : 0, inner_strip = blocks * steps * kStrip;
  float *firsts = nullptr, *inner_sums = nullptr, *inner = nullptr;
  if (inner_strips) {
    firsts = static_cast<float*>(scratch(Slot::inner_strips, inner_strips * inner_strip * sizeof(float)));
    inner_sums = static_cast<float*>(scratch(Slot::inner_sums, inner_strips * panel * kStrip * sizeof(float)));
  }
  if (inner_blocks) inner = static_cast<float*>(scratch(Slot::inner, panel * inner_pieces * kPiece * sizeof(float)));
  if ((inner_strips && !(firsts && inner_sums)) || (inner_blocks && !inner)) return false;
  parallel_for(call.threads, inner_strips, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      dense_strip<Unit::is_bf16>([&](int64_t i, int64_t r) { return elements.first(i, s * kStrip + r); }, 0, blocks, depth,
                                 low.rank - s * kStrip, firsts + s * inner_strip);
  });

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
        if (!call.low_rank) return;
        const DenormalsAreZero mode;
        auto* const given = static_cast<X*>(low.inner) + row * low.rank;
        const int64_t begin = first * Unit::rows, end = least(last * Unit::rows, rows);
        Unit unit;
        for (int64_t s = 0; s < inner_strips; ++s)
          for (int64_t r = begin; r < end; r += Unit::rows) {
            float* const sums = inner_sums + (s * panel + r) * kStrip;
            const int count = static_cast<int>(least<int64_t>(Unit::rows, end - r));
            const int64_t ranks = least<int64_t>(kStrip, low.rank - s * kStrip);
            for (int64_t chunk = 0; chunk < here; chunk += chunk_blocks)
              unit.multiply(packed + (r * pieces + chunk * steps / kPiece * Unit::rows) * kPiece,
                            firsts + s * inner_strip + (part + chunk) * steps * kStrip,
                            least(chunk_blocks, here - chunk) * steps / kPiece, sums, count, ranks, part + chunk > 0);
            if (part + here == blocks)
              finish<X>(sums, count, ranks, nullptr, given + r * low.rank + s * kStrip, low.rank);
          }
        if (part + here == blocks && inner_blocks) pack<Unit>(given, low.rank, rows, low.rank, inner_pieces, first, last, inner);
      });
      if (!y) continue;
      parallel_for(call.threads, strips, [&](int64_t first, int64_t last) {
        const int64_t strip_blocks = inner_blocks > chunk_blocks ? inner_blocks : chunk_blocks;
        auto* const room = static_cast<float*>(scratch(Slot::strip, strip_blocks * steps * kStrip * sizeof(float)));
        auto* sums = kept ? kept : static_cast<float*>(scratch(Slot::sums, panel * kStrip * sizeof(float)));
        if (!room || !sums) {
          __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
          return;
        }
        const DenormalsAreZero mode;
        Unit unit;
        for (int64_t s = first; s < last; ++s) {
          if (kept) sums = kept + s * panel * kStrip;
          for (int64_t chunk = 0; chunk < here; chunk += chunk_blocks) {
            const int64_t length = least(chunk_blocks, here - chunk), start = (part + chunk) * kBlock;
            const float* const strip = make_strip(w.weight, s * kStrip, start, length, room);
            for (int64_t r = 0; r < rows; r += Unit::rows)
              unit.multiply(packed + (r * pieces + chunk * steps / kPiece * Unit::rows) * kPiece, strip,
                            length * steps / kPiece, sums + r * kStrip, static_cast<int>(least<int64_t>(Unit::rows, rows - r)), kStrip,
                            part + chunk > 0);
          }
          if (part + here < blocks) continue;
          if (inner_blocks) {
            dense_strip<Unit::is_bf16>([&](int64_t r, int64_t i) { return elements.second(r, s * kStrip + i); }, 0, inner_blocks,
                                       low.rank, columns - s * kStrip, room);
            for (int64_t r = 0; r < rows; r += Unit::rows)
              unit.multiply(inner + r * inner_pieces * kPiece, room, inner_pieces, sums + r * kStrip,
                            static_cast<int>(least<int64_t>(Unit::rows, rows - r)), kStrip, true);
          }
          finish(sums, rows, least<int64_t>(kStrip, columns - s * kStrip), bias ? bias + s * kStrip : nullptr,
                 y + row * columns + s * kStrip, columns);
        }
      });
    }
  }
  return memory;
}

inline bool linear(const LinearCall& call) {
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
