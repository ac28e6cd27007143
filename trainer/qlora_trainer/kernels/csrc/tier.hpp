// What every tier implements: a table of functions, and which tiers there are.
#pragma once
#include <cstdint>

namespace qlora {

struct bf16;

// What a weight W (n, k) is kept in. Its rows are filled up with zeros to a multiple of 32, np, but for kRowMajor.
enum Form { kFourBits = 0, kInt8 = 1, kDense = 2, kRowMajor = 3 };

// In 4 bits (NF4 or FP4, by its levels), k a multiple of `block`. Blocks of 32 k x 16 n, so that a strip of either 32 n or 32 k is dequantized from whole lines:
//   codes[k / 32][np / 16][16 pairs of k][16 n]   a byte: the code of the even k in its high half, of the odd k below
// and the scale of `block` weights along k, either as it is or in 8 bits:
//   scale[k / block][np]  =  scales   or
//     scale_levels[scale_codes] * scale_absmax[(n * k / block + k' / block) / 256] + scale_offset
struct Nf4Matrix {
  const uint8_t* codes;
  const float* levels;  // (16,)
  const float* scales;  // (k / block, np), or nullptr
  const uint8_t* scale_codes;  // (k / block, np)
  const float* scale_levels;   // (256,)
  const float* scale_absmax;
  float scale_offset;
  int64_t n, k;
  int64_t block;  // k that share a scale, a multiple of 32
};

// In 8 bits, code * scale of its row; k is filled up with zeros to a multiple of 32, kp.
struct Int8Matrix {
  const int8_t* codes;  // [np / 32][kp][32 n]
  const float* scales;  // (np,)
  int64_t n, k;
};

// As it is, in strips: k is filled up as above.
struct DenseMatrix {
  const void* numbers;  // float [np / 32][kp][32 n], or bf16 [np / 32][kp / 2][32 n][2 k]
  bool is_bf16;
  int64_t n, k;
};

// As a tensor lies, which others read as well: nothing is copied and nothing filled up.
struct RowMajorMatrix {
  const void* numbers;  // float or bf16 (n, k)
  bool is_bf16;
  int64_t n, k;
};

// A product of low rank beside W's: with A (rank, k), B (n, rank) and a scale s,
//   y += s (x A^T) B^T,  or  y += (s x B) A  when W is transposed, too.
// What is in brackets, (rows, rank), is the inner product: written to `inner`, in y's type, unless it is given there.
struct LowRank {
  const float* a;
  const float* b;
  float scale;
  int64_t rank;
  void* inner;
  bool inner_given;
  bool added;  // false: the inner product alone is wanted, y is W's
};

// y = x W^T + bias, or y = x W when `transposed`. x (rows, k or n), bias (n or k,) or nullptr and y are row-major and of
// one type. Without y, the inner product of low rank alone is made.
struct LinearCall {
  int form;
  const void* weight;  // of that form's struct
  const LowRank* low_rank;  // or nullptr
  bool transposed;
  bool is_bf16;  // else float
  int64_t rows;
  const void* x;
  const void* bias;
  void* y;
  int threads;
};

// y = factor x^T u, the sum over rows: x (rows, columns) and u (rows, rank) of one type -> y (columns, rank), or
// (rank, columns) when `transposed`.
struct SumOfOuterCall {
  bool is_bf16;  // else float
  int64_t rows, columns, rank;
  const void* x;
  const void* u;
  float factor;
  bool transposed;
  float* y;
  int threads;
};

struct Tier {
  bool (*linear)(const LinearCall& call);  // false: no memory for scratch
  bool (*sum_of_outer)(const SumOfOuterCall& call);  // false: no memory for scratch
  // The vector layer, a primitive each, for its tests: (n,) -> (n,).
  void (*to_bf16)(const float* x, bf16* y, int64_t n);
  void (*from_bf16)(const bf16* x, float* y, int64_t n);
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*reduce)(const float* x, float* sum_and_largest, int64_t n);
};

namespace avx2 {
extern const Tier tier;
}
namespace avx512 {
extern const Tier tier;
}
namespace avx512_bf16 {
extern const Tier tier;
}
namespace amx_bf16 {
extern const Tier tier;
}
namespace amx_emulated {  // the code of amx_bf16, with the tile unit in plain C++
extern const Tier tier;
}

}  // namespace qlora
