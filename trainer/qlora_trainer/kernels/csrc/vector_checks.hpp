// simd.hpp, a primitive each, so that tests can hold it against what it should be.
#pragma once
#include "simd.hpp"

namespace qlora::QLORA_TIER {

// y = f(x), element by element, the last short vector included.
template <class X, class Y, class F>
QLORA_INLINE void map(const X* x, Y* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) store(y + i, f(load(x + i)));
  if (i < n) store(y + i, f(load(x + i, n - i)), n - i);
}

inline void to_bf16(const float* x, bf16* y, int64_t n) {
  map(x, y, n, [](Vec a) { return a; });
}

inline void from_bf16(const bf16* x, float* y, int64_t n) {
  map(x, y, n, [](Vec a) { return a; });
}

inline void exp2_of(const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec a) { return exp2(a); });
}

// (n,) -> the sum of all and the largest magnitude.
inline void reduce(const float* x, float* y, int64_t n) {
  Vec total = zero(), most = zero();
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) {
    total = add(total, load(x + i));
    most = max(most, abs(load(x + i)));
  }
  if (i < n) {
    total = add(total, load(x + i, n - i));
    most = max(most, abs(load(x + i, n - i)));
  }
  y[0] = sum(total);
  y[1] = largest(most);
}

}  // namespace qlora::QLORA_TIER
