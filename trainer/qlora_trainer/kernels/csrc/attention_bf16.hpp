// Causal attention of packed samples of bf16, where the processor multiplies them: the tasks, blocks and statistics of
// attention.hpp, with products of bf16 (multiply.hpp) that are summed in fp32. Scores, the softmax and everything that is
// added up are fp32; probabilities and the gradients of scores are rounded to bf16 as they are multiplied.
//
// A block is kSide queries x kSide keys. Of 32 keys there is a line of scores for each query; scores, sums and gradients
// are [lines or strips][rows][32], as Unit writes them. P packed by rows is multiplied with V, and turned with dO.
#pragma once
#include "attention.hpp"
#include "dense_strip.hpp"
#include "pack.hpp"

namespace qlora::QLORA_TIER {

constexpr int64_t kSide = 64, kLines = kSide / kStrip;
constexpr int64_t kStripPiece = kPiece * kStrip;  // dwords of a strip that a piece is multiplied with

template <class Unit>
constexpr int64_t kPackedRows = (kSide + Unit::rows - 1) / Unit::rows * Unit::rows;

// A head's rows of a task, and how its head size is cut: `strips` of 32, the last one filled up.
struct Head {
  const bf16* data;
  int64_t stride, size, strips;
  Head(const Attention::Rows& rows, int64_t start, int head, int64_t size)
      : data(static_cast<const bf16*>(rows.data) + head * rows.head + start * rows.token), stride(rows.token), size(size),
        strips(pieces_of(size, kStrip)) {}

  const bf16* row(int64_t i) const { return data + i * stride; }
  int64_t columns(int64_t strip) const { return least<int64_t>(kStrip, size - strip * kStrip); }

  // Strips over the head's numbers, one for 32 rows: for products that give scores.
  void over_columns(int64_t length, float* to) const {
    for (int64_t i = 0; i < length; i += kStrip, to += strips * kStripPiece)
      strip_over_columns<true>(row(i), stride, length - i, size, strips, to);
  }
  // Strips over rows, one for 32 of the head's numbers, `blocks` of 32 rows long: for products that sum over them.
  void over_rows(int64_t first, int64_t rows, int64_t blocks, float* to) const {
    for (int64_t c = 0; c < strips; ++c, to += blocks * kStripPiece)
      strip_over_rows<true>(row(first) + c * kStrip, stride, 0, blocks, rows, columns(c), to);
  }
  template <class Unit>
  void packed(int64_t first, int64_t rows, float* to) const {
    pack<Unit>(row(first), stride, rows, size, strips, 0, pieces_of(rows, Unit::rows), to);
  }
};

// Where a row of a block lies in what is packed, kLines pieces long.
template <class Unit>
QLORA_INLINE float* packed_line(float* packed, int64_t row, int64_t line) {
  const int64_t first = row / Unit::rows * Unit::rows;
  return packed + (first * kLines + line * Unit::rows + row - first) * kPiece;
}

// 32 numbers of a row -> a piece.
QLORA_INLINE void round_line(const float* line, float* piece) {
  auto* const to = reinterpret_cast<bf16*>(piece);
  for (int64_t c = 0; c < kStrip; c += Vec::width) store_normal(to + c, load(line + c));
}

// A block of lines (kSide, kSide) -> its columns as packed rows, pieces over its rows.
template <class Unit>
inline void pack_turned(const float* lines, float* packed) {
  alignas(64) float pairs[Vec::width * Vec::width], turned[Vec::width * kPiece];
  for (int64_t piece = 0; piece < kLines; ++piece)
    for (int64_t column = 0; column < kSide; column += Vec::width) {
      const float* from = lines + (column / kStrip * kSide + piece * kStrip) * kStrip + column % kStrip;
      for (int64_t pair = 0; pair < kPiece; pair += Vec::width) {
        for (int64_t i = 0; i < Vec::width; ++i, from += 2 * kStrip)
          store_pairs(pairs + i * Vec::width, load(from), load(from + kStrip));
        transpose(pairs, Vec::width, turned + pair, kPiece);
      }
      for (int64_t i = 0; i < Vec::width; ++i)
        __builtin_memcpy(packed_line<Unit>(packed, column + i, piece), turned + i * kPiece, kPiece * sizeof(float));
    }
}

// A line's scores, as products gave them: scaled, capped, and hidden where the query at `position` does not see the key.
QLORA_INLINE void finish_line(const Attention& a, float* line, int64_t position, int64_t start) {
  for (int64_t c = 0; c < kStrip; c += Vec::width) {
    Vec score = mul(load(line + c), set1(a.scale));
    if (a.softcap != 0.0f) score = mul(set1(a.softcap), tanh(mul(score, set1(1.0f / a.softcap))));
    store(line + c, score);
  }
  const bool whole = position >= start + kStrip - 1 && (!a.window || start > position - a.window);
  if (!whole) hide(line, position, start, kStrip, a.window);
}

// Rows of sums in strips, times factors -> (rows, size), `stride` apart.
inline void write_rows(const float* sums, int64_t rows_of_strip, const Head& head, int64_t rows, const float* factors, float factor,
                       bf16* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const Vec times = set1(factors ? factors[r] : factor);
    for (int64_t c = 0; c < head.strips; ++c) {
      const float* const from = sums + (c * rows_of_strip + r) * kStrip;
      each_vector(head.columns(c), [&](int64_t i, auto at) { at.store(to + c * kStrip + i, mul(load(from + i), times)); });
    }
  }
}

template <class Unit>
struct Bf16ForwardArrays {
  float *keys, *values, *query, *scores, *packed, *sums, *most, *total, *fade, *added;
  Bf16ForwardArrays(Arrays& a, int64_t length, int64_t strips, int64_t)
      : keys(a.take(pieces_of(length, kSide) * kLines * strips * kStripPiece)), values(a.take(pieces_of(length, kSide) * kLines * strips * kStripPiece)),
        query(a.take(kPackedRows<Unit> * strips * kPiece)), scores(a.take(kSide * kSide)), packed(a.take(kPackedRows<Unit> * kLines * kPiece)),
        sums(a.take(strips * kSide * kStrip)), most(a.take(kSide)), total(a.take(kSide)), fade(a.take(kSide)), added(a.take(kSide)) {}
};

template <class Unit>
struct Bf16BackwardArrays {
  float *keys, *values, *key_rows, *dkeys, *dvalues, *query, *doutput, *query_rows, *doutput_rows, *dquery, *scores, *dscores, *packed, *turned,
      *products;
  Bf16BackwardArrays(Arrays& a, int64_t length, int64_t strips, int64_t)
      : keys(a.take(pieces_of(length, kSide) * kLines * strips * kStripPiece)), values(a.take(pieces_of(length, kSide) * kLines * strips * kStripPiece)),
        key_rows(a.take(pieces_of(length, kSide) * kLines * strips * kStripPiece)), dkeys(a.take(pieces_of(length, kSide) * kSide * strips * kStrip)),
        dvalues(a.take(pieces_of(length, kSide) * kSide * strips * kStrip)), query(a.take(kPackedRows<Unit> * strips * kPiece)),
        doutput(a.take(kPackedRows<Unit> * strips * kPiece)), query_rows(a.take(kLines * strips * kStripPiece)),
        doutput_rows(a.take(kLines * strips * kStripPiece)), dquery(a.take(strips * kSide * kStrip)), scores(a.take(kSide * kSide)),
        dscores(a.take(kSide * kSide)), packed(a.take(kPackedRows<Unit> * kLines * kPiece)), turned(a.take(kPackedRows<Unit> * kLines * kPiece)),
        products(a.take(kSide)) {}
};

// Lines of scores of a block (i, j): rows of packed activations times strips of keys. `columns`: keys that any of them sees.
template <class Unit>
QLORA_INLINE void multiply_lines(Unit& unit, const float* packed, const float* strips, int64_t pieces, int64_t i, int64_t j, int64_t rows,
                                 int64_t columns, float* lines) {
  for (int64_t t = 0; t < rows; t += Unit::rows) {
    const int64_t here = least<int64_t>(Unit::rows, rows - t), seen = seen_of(i + t, here, j, columns);
    for (int64_t line = 0; line * kStrip < seen; ++line)
      unit.multiply(packed + t * pieces * kPiece, strips + line * pieces * kStripPiece, pieces, lines + (line * kSide + t) * kStrip,
                    static_cast<int>(here), kStrip, false);
  }
}

// The sums over the keys that a block's rows see: packed lines times strips over keys, `key_blocks` of 32 long.
template <class Unit>
QLORA_INLINE void multiply_packed(Unit& unit, const float* packed, const float* strips, int64_t key_blocks, const Head& head, int64_t i,
                                  int64_t j, int64_t rows, int64_t columns, float* sums, bool accumulate) {
  for (int64_t t = 0; t < rows; t += Unit::rows) {
    const int64_t here = least<int64_t>(Unit::rows, rows - t), seen = seen_of(i + t, here, j, columns);
    if (seen == 0) continue;
    for (int64_t c = 0; c < head.strips; ++c)
      unit.multiply(packed + t * kLines * kPiece, strips + (c * key_blocks + j / kStrip) * kStripPiece, pieces_of(seen, kStrip),
                    sums + (c * kSide + t) * kStrip, static_cast<int>(here), head.columns(c), accumulate);
  }
}

template <class Unit>
inline bool attention_bf16(const Attention& a, const AttentionTask& task) {
  const DenormalsAreZero mode;  // which a far key's probability becomes
  const int64_t size = a.head_size, length = task.length, key_blocks = pieces_of(length, kSide) * kLines;
  const int group = a.heads / a.key_heads;
  const Head keys(a.key, task.start, task.key_head, size), values(a.value, task.start, task.key_head, size);
  const auto s = arrays_of<Bf16ForwardArrays<Unit>>(length, keys.strips, 0);
  if (!s.keys) return false;
  Unit unit;
  keys.over_columns(length, s.keys);
  values.over_rows(0, length, key_blocks, s.values);
  for (int head = task.key_head * group; head < (task.key_head + 1) * group; ++head) {
    const Head queries(a.query, task.start, head, size);
    for (int64_t i = 0; i < length; i += kSide) {
      const int64_t rows = least<int64_t>(kSide, length - i), first = task.start + i;
      queries.packed<Unit>(i, rows, s.query);
      fill(s.sums, keys.strips * kSide * kStrip, 0.0f);
      begin_rows(s, kSide);
      for (int64_t j = first_block(i, a.window); j < i + rows; j += kSide) {
        const int64_t columns = least<int64_t>(kSide, i + rows - j);
        multiply_lines(unit, s.query, s.keys + j / kStrip * keys.strips * kStripPiece, keys.strips, i, j, rows, columns, s.scores);
        bool fades = false;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t t = r / Unit::rows * Unit::rows, lines = pieces_of(seen_of(i + t, least<int64_t>(Unit::rows, rows - t), j, columns), kStrip);
          Vec most = set1(s.most[r]);
          for (int64_t l = 0; l < lines; ++l) {
            float* const line = s.scores + (l * kSide + r) * kStrip;
            finish_line(a, line, i + r, j + l * kStrip);
            for (int64_t c = 0; c < kStrip; c += Vec::width) most = max(load(line + c), most);
          }
          const float now = largest(most);
          Vec total = zero();
          for (int64_t l = 0; l < lines; ++l) {
            float* const line = s.scores + (l * kSide + r) * kStrip;
            for (int64_t c = 0; c < kStrip; c += Vec::width) {
              const Vec e = exp(sub(load(line + c), set1(now)));
              store(line + c, e);
              total = add(total, e);
            }
            round_line(line, packed_line<Unit>(s.packed, r, l));
          }
          s.fade[r] = s.most[r] - now;
          fades |= s.fade[r] != 0.0f;
          s.most[r] = now;
          s.added[r] = sum(total);
        }
        fade_totals(s, kSide);
        for (int64_t line = 0; fades && line < keys.strips * kSide; ++line)
          for (int64_t c = 0; c < kStrip; c += Vec::width) {
            float* const sums = s.sums + line * kStrip + c;
            store(sums, mul(load(sums), set1(s.fade[line % kSide])));
          }
        multiply_packed(unit, s.packed, s.values, key_blocks, values, i, j, rows, columns, s.sums, true);
      }
      for (int64_t r = 0; r < rows; ++r) {
        s.total[r] = 1.0f / s.total[r];
        a.statistics[head * a.tokens + first + r] = s.most[r];
        a.statistics[(a.heads + head) * a.tokens + first + r] = s.total[r];
      }
      write_rows(s.sums, kSide, values, rows, s.total, 1.0f, static_cast<bf16*>(a.output) + (first * a.heads + head) * size, a.heads * size);
    }
  }
  return true;
}

// See attention_grad of attention.hpp.
template <class Unit>
inline bool attention_grad_bf16(const Attention& a, const AttentionTask& task) {
  const DenormalsAreZero mode;  // which a far key's probability becomes
  const int64_t size = a.head_size, length = task.length, key_blocks = pieces_of(length, kSide) * kLines, padded = key_blocks * kStrip;
  const int group = a.heads / a.key_heads;
  const Head keys(a.key, task.start, task.key_head, size), values(a.value, task.start, task.key_head, size);
  const auto s = arrays_of<Bf16BackwardArrays<Unit>>(length, keys.strips, 0);
  if (!s.keys) return false;
  Unit unit;
  keys.over_columns(length, s.keys);
  values.over_columns(length, s.values);
  keys.over_rows(0, length, key_blocks, s.key_rows);
  fill(s.dkeys, padded * keys.strips * kStrip, 0.0f);
  fill(s.dvalues, padded * keys.strips * kStrip, 0.0f);
  for (int head = task.key_head * group; head < (task.key_head + 1) * group; ++head) {
    const Head queries(a.query, task.start, head, size), gradients(a.gradient, task.start, head, size);
    for (int64_t i = 0; i < length; i += kSide) {
      const int64_t rows = least<int64_t>(kSide, length - i), first = task.start + i, start = first_block(i, a.window);
      queries.packed<Unit>(i, rows, s.query);
      gradients.packed<Unit>(i, rows, s.doutput);
      queries.over_rows(i, rows, kLines, s.query_rows);
      gradients.over_rows(i, rows, kLines, s.doutput_rows);
      for (int64_t r = 0; r < rows; ++r) {
        const bf16 *const output = static_cast<const bf16*>(a.output) + ((first + r) * a.heads + head) * size, *const doutput = gradients.row(i + r);
        Vec product = zero();
        each_vector(size, [&](int64_t c, auto at) { product = fma(at.load(doutput + c), at.load(output + c), product); });
        s.products[r] = sum(product);
      }
      const float* const most = a.statistics + head * a.tokens + first;
      const float* const factor = most + a.heads * a.tokens;
      for (int64_t j = start; j < i + rows; j += kSide) {
        const int64_t columns = least<int64_t>(kSide, i + rows - j), strip = j / kStrip * keys.strips * kStripPiece;
        multiply_lines(unit, s.query, s.keys + strip, keys.strips, i, j, rows, columns, s.scores);
        multiply_lines(unit, s.doutput, s.values + strip, keys.strips, i, j, rows, columns, s.dscores);
        for (int64_t r = 0; r < kSide; ++r) {
          const int64_t t = r / Unit::rows * Unit::rows;
          const int64_t lines = r < rows ? pieces_of(seen_of(i + t, least<int64_t>(Unit::rows, rows - t), j, columns), kStrip) : 0;
          for (int64_t l = 0; l < kLines; ++l) {
            float *const line = s.scores + (l * kSide + r) * kStrip, *const dline = s.dscores + (l * kSide + r) * kStrip;
            if (l >= lines) {  // nobody has multiplied; the sums over queries and keys take these as they are
              fill(line, kStrip, 0.0f);
              fill(dline, kStrip, 0.0f);
              continue;
            }
            finish_line(a, line, i + r, j + l * kStrip);
            for (int64_t c = 0; c < kStrip; c += Vec::width) {
              const Vec score = load(line + c), p = mul(exp(sub(score, set1(most[r]))), set1(factor[r]));
              Vec ds = mul(p, sub(load(dline + c), set1(s.products[r])));
              if (a.softcap != 0.0f) {  // dS = dL (1 - (L / softcap)^2), L = softcap tanh(S / softcap), where L is not hidden
                const Vec part = max(mul(score, set1(1.0f / a.softcap)), set1(-1.0f));
                ds = mul(ds, sub(set1(1.0f), mul(part, part)));
              }
              store(line + c, p);
              store(dline + c, ds);
            }
            round_line(dline, packed_line<Unit>(s.packed, r, l));
          }
        }
        multiply_packed(unit, s.packed, s.key_rows, key_blocks, keys, i, j, rows, columns, s.dquery, j != start);
        const auto add_turned = [&](const float* lines, const float* strips, float* sums) {
          pack_turned<Unit>(lines, s.turned);
          for (int64_t t = 0; t < columns; t += Unit::rows) {
            const int64_t here = least<int64_t>(Unit::rows, columns - t), pieces = pieces_of(rows, kStrip);
            const int64_t skipped = j + t > i ? (j + t - i) / kStrip : 0;  // pieces of queries that see none of these keys
            for (int64_t c = 0; c < keys.strips && skipped < pieces; ++c)
              unit.multiply(s.turned + (t * kLines + skipped * Unit::rows) * kPiece, strips + (c * kLines + skipped) * kStripPiece, pieces - skipped,
                            sums + (c * padded + j + t) * kStrip, static_cast<int>(here), keys.columns(c), true);
          }
        };
        add_turned(s.scores, s.doutput_rows, s.dvalues);
        add_turned(s.dscores, s.query_rows, s.dkeys);
      }
      write_rows(s.dquery, kSide, queries, rows, nullptr, a.scale, static_cast<bf16*>(a.dquery) + (first * a.heads + head) * size, a.heads * size);
    }
  }
  const int64_t to = (task.start * a.key_heads + task.key_head) * size, stride = a.key_heads * size;
  write_rows(s.dkeys, padded, keys, length, nullptr, a.scale, static_cast<bf16*>(a.dkey) + to, stride);
  write_rows(s.dvalues, padded, values, length, nullptr, 1.0f, static_cast<bf16*>(a.dvalue) + to, stride);
  return true;
}

inline bool attention_of(const Attention& a, const AttentionTask& task) {
  if (a.type != kBf16) return attention<float>(a, task);
#ifdef QLORA_TILES
  return attention_bf16<TileUnit>(a, task);
#elif defined(__AVX512BF16__)
  return attention_bf16<VectorUnit<Dots>>(a, task);
#else
  return attention<bf16>(a, task);
#endif
}

inline bool attention_grad_of(const Attention& a, const AttentionTask& task) {
  if (a.type != kBf16) return attention_grad<float>(a, task);
#ifdef QLORA_TILES
  return attention_grad_bf16<TileUnit>(a, task);
#elif defined(__AVX512BF16__)
  return attention_grad_bf16<VectorUnit<Dots>>(a, task);
#else
  return attention_grad<bf16>(a, task);
#endif
}

}  // namespace qlora::QLORA_TIER
