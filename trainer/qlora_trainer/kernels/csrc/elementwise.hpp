// RMSNorm and SwiGLU, forward and backward: each reads its inputs once or twice and writes its outputs once.
#pragma once
#include "passes.hpp"
#include "simd.hpp"

namespace qlora::QLORA_TIER {

// body(i, at) for each vector of n elements; at.load and at.store know how much of the last one there is.
struct Whole {
  template <class T>
  QLORA_INLINE Vec load(const T* p) const {
    return QLORA_TIER::load(p);
  }
  template <class T>
  QLORA_INLINE void store(T* p, Vec a) const {
    QLORA_TIER::store(p, a);
  }
};
struct Part {
  int64_t n;
  template <class T>
  QLORA_INLINE Vec load(const T* p) const {
    return QLORA_TIER::load(p, n);
  }
  template <class T>
  QLORA_INLINE void store(T* p, Vec a) const {
    QLORA_TIER::store(p, a, n);
  }
};
template <class Body>
QLORA_INLINE void each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// e^x to two units in the last place: 0 far below the range, infinity above it, NaN of NaN. x = n ln 2 + r, and e^r by a
// polynomial of degree 6 with a relative error below 2^-28.
QLORA_INLINE Vec exp(Vec x) {
  const Vec bounded = max(set1(-105.0f), min(set1(89.5f), x));
  const Vec n = round(mul(bounded, set1(1.44269504f)));
  const Vec r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145751953125f), bounded));
  Vec p = set1(0.001381459878757596f);
  p = fma(p, r, set1(0.008368716575205326f));
  p = fma(p, r, set1(0.04166838899254799f));
  p = fma(p, r, set1(0.1666652113199234f));
  p = fma(p, r, set1(0.4999999403953552f));
  return scale2(add(fma(mul(r, r), p, r), set1(1.0f)), n);
}

// The sum of four partial ones, added up in the same order whatever made them.
QLORA_INLINE float sum_of(const Vec* parts) { return sum(add(add(parts[0], parts[1]), add(parts[2], parts[3]))); }

// What is left of x when it is stored as T.
QLORA_INLINE Vec rounded_to(const float*, Vec x) { return x; }
QLORA_INLINE Vec rounded_to(const bf16*, Vec x) { return widen(narrow(x)); }

// y = w * round(x * scale), scale = 1 / sqrt(mean(x^2) + epsilon), rounded to T before w as transformers does it.
template <class T>
inline void rms_norm(const T* x, const T* weight, T* y, float* scale, int64_t rows, int64_t size, float epsilon) {
  for (int64_t row = 0; row < rows; ++row, x += size, y += size) {
    Vec squares[4] = {zero(), zero(), zero(), zero()};
    each_vector(size, [&](int64_t i, auto at) {
      const Vec value = at.load(x + i);
      Vec& part = squares[i / Vec::width % 4];
      part = fma(value, value, part);
    });
    scale[row] = 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(size) + epsilon);
    const Vec factor = set1(scale[row]);
    each_vector(size, [&](int64_t i, auto at) {
      at.store(y + i, mul(rounded_to(x, mul(at.load(x + i), factor)), at.load(weight + i)));
    });
  }
}

// dx = scale * (g - normed * mean(g * normed)), g = dy * w, normed = x * scale.
template <class T>
inline void rms_norm_grad(const T* x, const T* weight, const float* scale, const T* dy, T* dx, int64_t rows, int64_t size) {
  for (int64_t row = 0; row < rows; ++row, x += size, dy += size, dx += size) {
    Vec products[4] = {zero(), zero(), zero(), zero()};
    each_vector(size, [&](int64_t i, auto at) {
      Vec& part = products[i / Vec::width % 4];
      part = fma(at.load(x + i), mul(at.load(dy + i), at.load(weight + i)), part);
    });
    const float s = scale[row];
    const Vec factor = set1(s), along = set1(sum_of(products) * s * s / static_cast<float>(size));
    each_vector(size, [&](int64_t i, auto at) {
      const Vec g = mul(at.load(dy + i), at.load(weight + i));
      at.store(dx + i, mul(factor, sub(g, mul(along, at.load(x + i)))));
    });
  }
}

QLORA_INLINE Vec sigmoid(Vec x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// y = gate * sigmoid(gate) * up, rounded once.
template <class T>
inline void swiglu(const T* gate, const T* up, T* y, int64_t n) {
  each_vector(n, [&](int64_t i, auto at) {
    const Vec g = at.load(gate + i);
    at.store(y + i, mul(mul(g, sigmoid(g)), at.load(up + i)));
  });
}

// dup = silu(gate) dy, dgate = dy up (q + q (gate - gate q)), q = sigmoid(gate).
template <class T>
inline void swiglu_grad(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n) {
  each_vector(n, [&](int64_t i, auto at) {
    const Vec g = at.load(gate + i), d = at.load(dy + i), u = at.load(up + i), q = sigmoid(g), silu = mul(g, q);
    at.store(dup + i, mul(silu, d));
    at.store(dgate + i, mul(mul(d, u), fma(q, sub(g, silu), q)));
  });
}

// The table's functions, for each type.
inline void rms_norm_of(int type, const void* x, const void* weight, void* y, float* scale, int64_t rows, int64_t size, float epsilon) {
  if (type == kBf16)
    rms_norm(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), static_cast<bf16*>(y), scale, rows, size, epsilon);
  else
    rms_norm(static_cast<const float*>(x), static_cast<const float*>(weight), static_cast<float*>(y), scale, rows, size, epsilon);
}

inline void rms_norm_grad_of(int type, const void* x, const void* weight, const float* scale, const void* dy, void* dx, int64_t rows,
                             int64_t size) {
  if (type == kBf16)
    rms_norm_grad(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), scale, static_cast<const bf16*>(dy),
                  static_cast<bf16*>(dx), rows, size);
  else
    rms_norm_grad(static_cast<const float*>(x), static_cast<const float*>(weight), scale, static_cast<const float*>(dy),
                  static_cast<float*>(dx), rows, size);
}

inline void swiglu_of(int type, const void* gate, const void* up, void* y, int64_t n) {
  if (type == kBf16)
    swiglu(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<bf16*>(y), n);
  else
    swiglu(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(y), n);
}

inline void swiglu_grad_of(int type, const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n) {
  if (type == kBf16)
    swiglu_grad(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<const bf16*>(dy),
                static_cast<bf16*>(dgate), static_cast<bf16*>(dup), n);
  else
    swiglu_grad(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<const float*>(dy),
                static_cast<float*>(dgate), static_cast<float*>(dup), n);
}

}  // namespace qlora::QLORA_TIER
