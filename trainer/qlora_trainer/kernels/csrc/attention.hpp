// Causal attention of packed samples, forward and backward, in fp32 whatever is read and written: of fp32, and of bf16
// where the processor does not multiply them (attention_bf16.hpp).
//
// A task is a sample and a head of keys, with all heads of queries that read it (grouped queries), so that no two tasks
// write to the same gradient and what is added up is added in one order. Its keys and values are widened and laid out for
// the products once. Scores exist a block of kQueries x kKeys at a time: forward with the softmax kept up while blocks of
// keys pass by (Milakov and Gimelshein 2018), backward made again from each row's statistics (Dao et al. 2022). Blocks
// that no query sees are skipped, and so is of a block what no row of a tile of kTileRows queries sees.
#pragma once
#include <cstring>

#include "elementwise.hpp"
#include "threads.hpp"

namespace qlora::QLORA_TIER {

// Multiples of kTileRows, and of every vector.
constexpr int kQueries = 48, kKeys = 64, kTileRows = 6;

// ROWS x COLUMNS vectors of C = [C +] A B, in registers. A's element (i, k) is a[i * row + k * step].
template <int ROWS, int COLUMNS>
QLORA_INLINE void multiply_tile(const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c, int64_t c_row,
                                int64_t depth, bool add_to) {
  Vec sums[ROWS][COLUMNS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) sums[i][j] = add_to ? load(c + i * c_row + j * Vec::width) : zero();
  for (int64_t k = 0; k < depth; ++k, a += step, b += b_row) {
    Vec line[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) line[j] = load(b + j * Vec::width);
    for (int i = 0; i < ROWS; ++i) {
      const Vec factor = set1(a[i * row]);
      for (int j = 0; j < COLUMNS; ++j) sums[i][j] = fma(factor, line[j], sums[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) store(c + i * c_row + j * Vec::width, sums[i][j]);
}

template <int COLUMNS>
inline void multiply_columns(const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c, int64_t c_row,
                             int64_t rows, int64_t depth, bool add_to) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * row, c += kTileRows * c_row)
    multiply_tile<kTileRows, COLUMNS>(a, row, step, b, b_row, c, c_row, depth, add_to);
  if (rows == 5) multiply_tile<5, COLUMNS>(a, row, step, b, b_row, c, c_row, depth, add_to);
  if (rows == 4) multiply_tile<4, COLUMNS>(a, row, step, b, b_row, c, c_row, depth, add_to);
  if (rows == 3) multiply_tile<3, COLUMNS>(a, row, step, b, b_row, c, c_row, depth, add_to);
  if (rows == 2) multiply_tile<2, COLUMNS>(a, row, step, b, b_row, c, c_row, depth, add_to);
  if (rows == 1) multiply_tile<1, COLUMNS>(a, row, step, b, b_row, c, c_row, depth, add_to);
}

// C (rows, columns) = [C +] A (rows, depth) B (depth, columns); columns is a multiple of the vector's width.
inline void multiply(const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                     int64_t columns, int64_t depth, bool add_to) {
  constexpr int kWide = Vec::width == 16 ? 4 : 2;  // 24 or 12 sums, of 32 or 16 registers
  int64_t j = 0;
  for (; j + kWide * Vec::width <= columns; j += kWide * Vec::width)
    multiply_columns<kWide>(a, row, step, b + j, b_row, c + j, c_row, rows, depth, add_to);
  if constexpr (kWide > 2)
    for (; j + 2 * Vec::width <= columns; j += 2 * Vec::width)
      multiply_columns<2>(a, row, step, b + j, b_row, c + j, c_row, rows, depth, add_to);
  for (; j < columns; j += Vec::width) multiply_columns<1>(a, row, step, b + j, b_row, c + j, c_row, rows, depth, add_to);
}

inline void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

QLORA_INLINE int64_t rounded_up(int64_t n, int64_t unit) { return pieces_of(n, unit) * unit; }

// A head's rows of a task: (length, size), rows `stride` apart.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  HeadRows(const Attention::Rows& rows, int64_t start, int head)
      : data(static_cast<const T*>(rows.data) + head * rows.head + start * rows.token), stride(rows.token) {}
};

// Rows times a factor, in fp32, `padded` apart; what is beyond `size` is 0.
template <class T>
inline void widen_rows(HeadRows<T> x, int64_t rows, int64_t size, int64_t padded, float factor, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const to = out + r * padded;
    const T* const from = x.data + r * x.stride;
    each_vector(size, [&](int64_t i, auto at) { store(to + i, mul(at.load(from + i), set1(factor))); });
  }
}

// (length, size) -> (blocks, size, kKeys): keys lie along the vectors. What is beyond the length is 0.
template <class T>
inline void transpose_blocks(HeadRows<T> x, int64_t length, int64_t size, float* out) {
  constexpr int64_t side = Vec::width;
  alignas(64) float square[side * side], turned[side * side];
  for (int64_t start = 0; start < length; start += kKeys, out += size * kKeys) {
    const int64_t rows = least<int64_t>(kKeys, length - start);
    if (rows < kKeys) memset(out, 0, sizeof(float) * static_cast<size_t>(size * kKeys));
    for (int64_t r = 0; r < rows; r += side)
      each_vector(size, [&](int64_t i, auto at) {
        const T* const from = x.data + (start + r) * x.stride + i;
        for (int64_t j = 0; j < side; ++j) store(square + j * side, r + j < rows ? at.load(from + j * x.stride) : zero());
        float* const to = out + i * kKeys + r;
        if (i + side <= size) return transpose(square, side, to, kKeys);
        transpose(square, side, turned, side);
        for (int64_t j = 0; i + j < size; ++j) store(to + j * kKeys, load(turned + j * side));
      });
  }
}

// Sets to -infinity what the query at `position` does not see of a row of scores, whose first is that of the key `start`.
inline void hide(float* scores, int64_t position, int64_t start, int64_t columns, int64_t window) {
  int64_t last = least(columns, position - start + 1), first = window ? position - window + 1 - start : 0;
  last = last < 0 ? 0 : last;
  first = first < 0 ? 0 : least(first, columns);
  fill(scores, first, -__builtin_inff());
  if (last < columns) fill(scores + last, columns - last, -__builtin_inff());
}

// Scores s become softcap tanh(s / softcap), `wide` of each of kKeys.
inline void cap(float* scores, int64_t rows, int64_t wide, float softcap) {
  for (int64_t r = 0; r < rows; ++r, scores += kKeys)
    for (int64_t c = 0; c < wide; c += Vec::width)
      store(scores + c, mul(set1(softcap), tanh(mul(load(scores + c), set1(1.0f / softcap)))));
}

// How many of a block's keys, `columns` from `start` on, the last of `rows` queries from `position` on sees.
QLORA_INLINE int64_t seen_of(int64_t position, int64_t rows, int64_t start, int64_t columns) {
  const int64_t before = position + rows - start;
  return before < 0 ? 0 : least(columns, before);
}

// The start of the first block of keys that the query at `position` sees.
QLORA_INLINE int64_t first_block(int64_t position, int64_t window) {
  const int64_t first = window ? position - window + 1 : 0;
  return first < 0 ? 0 : first / kKeys * kKeys;
}

// Cuts arrays out of the thread's scratch memory; adds up what they need first.
struct Arrays {
  float* next = nullptr;
  size_t floats = 0;
  float* take(int64_t n) {
    const size_t rounded = static_cast<size_t>(rounded_up(n, 16));
    floats += rounded;
    if (!next) return nullptr;
    float* const here = next;
    next += rounded;
    return here;
  }
};

struct ForwardArrays {
  float *keys, *values, *query, *sums, *scores, *most, *total, *fade, *added;
  ForwardArrays(Arrays& a, int64_t length, int64_t size, int64_t padded)
      : keys(a.take(rounded_up(length, kKeys) * size)), values(a.take(rounded_up(length, kKeys) * padded)),
        query(a.take(kQueries * padded)), sums(a.take(kQueries * padded)), scores(a.take(kQueries * kKeys)),
        most(a.take(kQueries)), total(a.take(kQueries)), fade(a.take(kQueries)), added(a.take(kQueries)) {}
};

struct BackwardArrays {
  float *keys, *values, *key_rows, *dkeys, *dvalues, *query, *dquery, *doutput, *probabilities, *dscores, *products;
  BackwardArrays(Arrays& a, int64_t length, int64_t size, int64_t padded)
      : keys(a.take(rounded_up(length, kKeys) * size)), values(a.take(rounded_up(length, kKeys) * size)),
        key_rows(a.take(rounded_up(length, kKeys) * padded)), dkeys(a.take(rounded_up(length, kKeys) * padded)),
        dvalues(a.take(rounded_up(length, kKeys) * padded)), query(a.take(kQueries * padded)),
        dquery(a.take(kQueries * padded)), doutput(a.take(kQueries * padded)), probabilities(a.take(kQueries * kKeys)),
        dscores(a.take(kQueries * kKeys)), products(a.take(kQueries)) {}
};

// The arrays in memory, or nothing in `arrays.keys` without memory.
template <class A>
inline A arrays_of(int64_t length, int64_t size, int64_t padded) {
  Arrays measure;
  A arrays(measure, length, size, padded);
  Arrays memory;
  memory.next = static_cast<float*>(scratch(Slot::pass, measure.floats * sizeof(float)));
  return memory.next ? A(memory, length, size, padded) : arrays;
}

// What is kept up of the rows of a block of queries, before any key: `rows` a multiple of the vector's width.
template <class A>
inline void begin_rows(const A& s, int64_t rows) {
  fill(s.most, rows, -1e30f);
  fill(s.total, rows, 0.0f);
  fill(s.fade, rows, 0.0f);
  fill(s.added, rows, 0.0f);
}

// After a block of keys: by how much each row's largest score has grown becomes the factor that its sums fade by, and its
// total does.
template <class A>
inline void fade_totals(const A& s, int64_t rows) {
  for (int64_t r = 0; r < rows; r += Vec::width) {
    const Vec factor = exp(load(s.fade + r));
    store(s.fade + r, factor);
    store(s.total + r, fma(load(s.total + r), factor, load(s.added + r)));
  }
}

template <class T>
inline bool attention(const Attention& a, const AttentionTask& task) {
  const DenormalsAreZero mode;  // which a far key's probability becomes
  const int64_t size = a.head_size, padded = rounded_up(size, Vec::width), length = task.length;
  const int group = a.heads / a.key_heads;
  const ForwardArrays s = arrays_of<ForwardArrays>(length, size, padded);
  if (!s.keys) return false;
  transpose_blocks(HeadRows<T>(a.key, task.start, task.key_head), length, size, s.keys);
  widen_rows(HeadRows<T>(a.value, task.start, task.key_head), length, size, padded, 1.0f, s.values);
  for (int head = task.key_head * group; head < (task.key_head + 1) * group; ++head) {
    for (int64_t i = 0; i < length; i += kQueries) {
      const int64_t rows = least<int64_t>(kQueries, length - i), first = task.start + i;
      widen_rows(HeadRows<T>(a.query, first, head), rows, size, padded, a.scale, s.query);
      fill(s.sums, rows * padded, 0.0f);
      begin_rows(s, kQueries);
      for (int64_t j = first_block(i, a.window); j < i + rows; j += kKeys) {
        const int64_t columns = least<int64_t>(kKeys, i + rows - j);
        for (int64_t t = 0; t < rows; t += kTileRows) {
          const int64_t here = least<int64_t>(kTileRows, rows - t);
          const int64_t wide = rounded_up(seen_of(i + t, here, j, columns), Vec::width);
          float* const scores = s.scores + t * kKeys;
          multiply(s.query + t * padded, padded, 1, s.keys + j * size, kKeys, scores, kKeys, here, wide, size, false);
          if (a.softcap != 0.0f) cap(scores, here, wide, a.softcap);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t t = r / kTileRows * kTileRows, here = least<int64_t>(kTileRows, rows - t);
          const int64_t wide = rounded_up(seen_of(i + t, here, j, columns), Vec::width);
          float* const scores = s.scores + r * kKeys;
          hide(scores, i + r, j, wide, a.window);
          Vec most = set1(s.most[r]);
          for (int64_t c = 0; c < wide; c += Vec::width) most = max(load(scores + c), most);
          const float now = largest(most);
          Vec total = zero();
          for (int64_t c = 0; c < wide; c += Vec::width) {
            const Vec e = exp(sub(load(scores + c), set1(now)));
            store(scores + c, e);
            total = add(total, e);
          }
          s.fade[r] = s.most[r] - now;
          s.most[r] = now;
          s.added[r] = sum(total);
        }
        fade_totals(s, kQueries);
        for (int64_t r = 0; r < rows; ++r) {
          float* const sums = s.sums + r * padded;
          for (int64_t c = 0; c < padded; c += Vec::width) store(sums + c, mul(load(sums + c), set1(s.fade[r])));
        }
        for (int64_t t = 0; t < rows; t += kTileRows) {
          const int64_t here = least<int64_t>(kTileRows, rows - t), seen = seen_of(i + t, here, j, columns);
          multiply(s.scores + t * kKeys, kKeys, 1, s.values + j * padded, padded, s.sums + t * padded, padded, here, padded, seen, true);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float factor = 1.0f / s.total[r];
        const float* const sums = s.sums + r * padded;
        T* const to = static_cast<T*>(a.output) + ((first + r) * a.heads + head) * size;
        each_vector(size, [&](int64_t c, auto at) { at.store(to + c, mul(load(sums + c), set1(factor))); });
        a.statistics[head * a.tokens + first + r] = s.most[r];
        a.statistics[(a.heads + head) * a.tokens + first + r] = factor;
      }
    }
  }
  return true;
}

// With P the probabilities, dP = dO V^T and D each row's dO . O: dS = P (dP - D), dV = P^T dO, dQ = dS K, dK = dS^T Q.
template <class T>
inline bool attention_grad(const Attention& a, const AttentionTask& task) {
  const DenormalsAreZero mode;  // which a far key's probability becomes
  const int64_t size = a.head_size, padded = rounded_up(size, Vec::width), length = task.length;
  const int group = a.heads / a.key_heads;
  const BackwardArrays s = arrays_of<BackwardArrays>(length, size, padded);
  if (!s.keys) return false;
  const HeadRows<T> keys(a.key, task.start, task.key_head), values(a.value, task.start, task.key_head);
  transpose_blocks(keys, length, size, s.keys);
  transpose_blocks(values, length, size, s.values);
  widen_rows(keys, length, size, padded, 1.0f, s.key_rows);
  fill(s.dkeys, length * padded, 0.0f);
  fill(s.dvalues, length * padded, 0.0f);
  for (int head = task.key_head * group; head < (task.key_head + 1) * group; ++head) {
    for (int64_t i = 0; i < length; i += kQueries) {
      const int64_t rows = least<int64_t>(kQueries, length - i), first = task.start + i;
      widen_rows(HeadRows<T>(a.query, first, head), rows, size, padded, a.scale, s.query);
      widen_rows(HeadRows<T>(a.gradient, first, head), rows, size, padded, 1.0f, s.doutput);
      for (int64_t r = 0; r < rows; ++r) {
        const T* const output = static_cast<const T*>(a.output) + ((first + r) * a.heads + head) * size;
        const float* const doutput = s.doutput + r * padded;
        Vec product = zero();
        each_vector(size, [&](int64_t c, auto at) { product = fma(load(doutput + c), at.load(output + c), product); });
        s.products[r] = sum(product);
      }
      const float* const most = a.statistics + head * a.tokens + first;
      const float* const factor = most + a.heads * a.tokens;
      const int64_t start = first_block(i, a.window);
      float slopes[kKeys];
      for (int64_t j = start; j < i + rows; j += kKeys) {
        const int64_t columns = least<int64_t>(kKeys, i + rows - j), all = rounded_up(columns, Vec::width);
        for (int64_t t = 0; t < rows; t += kTileRows) {
          const int64_t here = least<int64_t>(kTileRows, rows - t);
          const int64_t wide = rounded_up(seen_of(i + t, here, j, columns), Vec::width);
          multiply(s.query + t * padded, padded, 1, s.keys + j * size, kKeys, s.probabilities + t * kKeys, kKeys, here, wide, size,
                   false);
          multiply(s.doutput + t * padded, padded, 1, s.values + j * size, kKeys, s.dscores + t * kKeys, kKeys, here, wide, size,
                   false);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t t = r / kTileRows * kTileRows, here = least<int64_t>(kTileRows, rows - t);
          const int64_t wide = rounded_up(seen_of(i + t, here, j, columns), Vec::width);
          float *const probabilities = s.probabilities + r * kKeys, *const dscores = s.dscores + r * kKeys;
          if (a.softcap != 0.0f) {  // dS = dL (1 - (L / softcap)^2), L = softcap tanh(S / softcap)
            cap(probabilities, 1, wide, a.softcap);
            for (int64_t c = 0; c < wide; c += Vec::width) {
              const Vec t = mul(load(probabilities + c), set1(1.0f / a.softcap));
              store(slopes + c, sub(set1(1.0f), mul(t, t)));
            }
          }
          hide(probabilities, i + r, j, wide, a.window);
          for (int64_t c = 0; c < wide; c += Vec::width) {
            const Vec p = mul(exp(sub(load(probabilities + c), set1(most[r]))), set1(factor[r]));
            store(probabilities + c, p);
            store(dscores + c, mul(p, sub(load(dscores + c), set1(s.products[r]))));
          }
          if (a.softcap != 0.0f)
            for (int64_t c = 0; c < wide; c += Vec::width) store(dscores + c, mul(load(dscores + c), load(slopes + c)));
          // A tile of keys may reach beyond what this row sees of them.
          fill(probabilities + wide, all - wide, 0.0f);
          fill(dscores + wide, all - wide, 0.0f);
        }
        for (int64_t t = 0; t < columns; t += kTileRows) {
          const int64_t here = least<int64_t>(kTileRows, columns - t), skipped = j + t > i ? j + t - i : 0;
          const float *const p = s.probabilities + skipped * kKeys + t, *const ds = s.dscores + skipped * kKeys + t;
          float *const dvalues = s.dvalues + (j + t) * padded, *const dkeys = s.dkeys + (j + t) * padded;
          multiply(p, 1, kKeys, s.doutput + skipped * padded, padded, dvalues, padded, here, padded, rows - skipped, true);
          multiply(ds, 1, kKeys, s.query + skipped * padded, padded, dkeys, padded, here, padded, rows - skipped, true);
        }
        for (int64_t t = 0; t < rows; t += kTileRows) {
          const int64_t here = least<int64_t>(kTileRows, rows - t), seen = seen_of(i + t, here, j, columns);
          multiply(s.dscores + t * kKeys, kKeys, 1, s.key_rows + j * padded, padded, s.dquery + t * padded, padded, here, padded, seen,
                   j != start);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        T* const to = static_cast<T*>(a.dquery) + ((first + r) * a.heads + head) * size;
        const float* const from = s.dquery + r * padded;
        each_vector(size, [&](int64_t c, auto at) { at.store(to + c, mul(load(from + c), set1(a.scale))); });
      }
    }
  }
  for (int64_t r = 0; r < length; ++r) {
    const int64_t to = ((task.start + r) * a.key_heads + task.key_head) * size;
    each_vector(size, [&](int64_t c, auto at) {
      at.store(static_cast<T*>(a.dkey) + to + c, load(s.dkeys + r * padded + c));
      at.store(static_cast<T*>(a.dvalue) + to + c, load(s.dvalues + r * padded + c));
    });
  }
  return true;
}

}  // namespace qlora::QLORA_TIER
