// The library's functions, as ctypes calls them. Each takes the number of a tier (the order of library.TIERS) and a
// number of threads first, and returns 0, or what went wrong: the caller makes an exception of it.
#include <cstdint>

#include "threads.hpp"
#include "tier.hpp"

namespace {

enum Status { ok = 0, no_such_tier = 1, no_memory = 2 };

const qlora::Tier* const kTiers[] = {
    &qlora::avx2::tier, &qlora::avx512::tier, &qlora::avx512_bf16::tier, &qlora::amx_bf16::tier, &qlora::amx_emulated::tier,
};

const qlora::Tier* tier_of(int number) {
  return number < 0 || number >= static_cast<int>(sizeof kTiers / sizeof *kTiers) ? nullptr : kTiers[number];
}

}  // namespace

#define QLORA_API extern "C" __attribute__((visibility("default")))

// See LinearCall in tier.hpp.
QLORA_API int qlora_linear(int tier, int threads, int form, const void* weight, const qlora::LowRank* low_rank, int transposed,
                           int is_bf16, int64_t rows, const void* x, const void* bias, void* y) {
  const qlora::Tier* t = tier_of(tier);
  if (!t) return no_such_tier;
  return t->linear({form, weight, low_rank, transposed != 0, is_bf16 != 0, rows, x, bias, y, threads}) ? ok : no_memory;
}

// See SumOfOuterCall in tier.hpp.
QLORA_API int qlora_sum_of_outer(int tier, int threads, int is_bf16, int64_t rows, int64_t columns, int64_t rank,
                                 const void* x, const void* u, float factor, int transposed, float* y) {
  const qlora::Tier* t = tier_of(tier);
  if (!t) return no_such_tier;
  return t->sum_of_outer({is_bf16 != 0, rows, columns, rank, x, u, factor, transposed != 0, y, threads}) ? ok : no_memory;
}

QLORA_API int qlora_to_bf16(int tier, int, const float* x, qlora::bf16* y, int64_t n) {
  const qlora::Tier* t = tier_of(tier);
  if (!t) return no_such_tier;
  t->to_bf16(x, y, n);
  return ok;
}

QLORA_API int qlora_from_bf16(int tier, int, const qlora::bf16* x, float* y, int64_t n) {
  const qlora::Tier* t = tier_of(tier);
  if (!t) return no_such_tier;
  t->from_bf16(x, y, n);
  return ok;
}

QLORA_API int qlora_exp2(int tier, int, const float* x, float* y, int64_t n) {
  const qlora::Tier* t = tier_of(tier);
  if (!t) return no_such_tier;
  t->exp2(x, y, n);
  return ok;
}

QLORA_API int qlora_reduce(int tier, int, const float* x, float* sum_and_largest, int64_t n) {
  const qlora::Tier* t = tier_of(tier);
  if (!t) return no_such_tier;
  t->reduce(x, sum_and_largest, n);
  return ok;
}

// Adds to y (n,) at i the start of the range that i is in, plus one: what parallel_for does, for its tests.
QLORA_API int qlora_ranges(int, int threads, int64_t* y, int64_t n) {
  qlora::parallel_for(threads, n, [y](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] += begin + 1;
  });
  return ok;
}
