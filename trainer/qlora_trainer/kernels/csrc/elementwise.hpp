// RMSNorm and gated activations, forward and backward: each reads its inputs once or twice and writes its outputs once.
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

// tanh to a few units in the last place, small x too: (e^2x - 1) / (e^2x + 1), the -1 taken where nothing cancels.
QLORA_INLINE Vec tanh(Vec x) {
  const Vec bounded = max(set1(-40.0f), min(set1(40.0f), add(x, x)));
  const Vec n = round(mul(bounded, set1(1.44269504f)));
  const Vec r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145751953125f), bounded));
  Vec p = set1(0.001381459878757596f);  // as in exp
  p = fma(p, r, set1(0.008368716575205326f));
  p = fma(p, r, set1(0.04166838899254799f));
  p = fma(p, r, set1(0.1666652113199234f));
  p = fma(p, r, set1(0.4999999403953552f));
  const Vec less_one = add(scale2(fma(mul(r, r), p, r), n), sub(scale2(set1(1.0f), n), set1(1.0f)));
  return div(less_one, add(less_one, set1(2.0f)));
}

// The sum of four partial ones, added up in the same order whatever made them.
QLORA_INLINE float sum_of(const Vec* parts) { return sum(add(add(parts[0], parts[1]), add(parts[2], parts[3]))); }

// What is left of x when it is stored as T, if the weight is of T, too; with a wider one the product alone is rounded.
QLORA_INLINE Vec rounded_as(const float*, const float*, Vec x) { return x; }
QLORA_INLINE Vec rounded_as(const bf16*, const bf16*, Vec x) { return widen(narrow(x)); }
QLORA_INLINE Vec rounded_as(const bf16*, const float*, Vec x) { return x; }

// y = w * round(x * scale), scale = 1 / sqrt(mean(x^2) + epsilon), rounded to T before w as transformers does it.
template <class T, class W>
inline void rms_norm(const T* x, const W* weight, T* y, float* scale, int64_t rows, int64_t size, float epsilon) {
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
      at.store(y + i, mul(rounded_as(x, weight, mul(at.load(x + i), factor)), at.load(weight + i)));
    });
  }
}

// dx = scale * (g - normed * mean(g * normed)), g = dy * w, normed = x * scale.
template <class T, class W>
inline void rms_norm_grad(const T* x, const W* weight, const float* scale, const T* dy, T* dx, int64_t rows, int64_t size) {
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

// gate * sigmoid(gate).
struct Silu {
  static QLORA_INLINE Vec of(Vec gate) { return mul(gate, sigmoid(gate)); }
  // The activation and its derivative q + q (gate - gate q), q = sigmoid(gate).
  static QLORA_INLINE Vec with_slope(Vec gate, Vec& slope) {
    const Vec q = sigmoid(gate), value = mul(gate, q);
    slope = fma(q, sub(gate, value), q);
    return value;
  }
};

// GELU's approximation gate (1 + tanh u) / 2 = gate * q, q = sigmoid(2 u), u = sqrt(2 / pi) (gate + 0.044715 gate^3). Beyond
// +-10, where q is 0 or 1 in fp32, that of 10 is taken: nothing overflows.
struct GeluTanh {
  // e^(-2 u), of which q is 1 / (1 + e^(-2 u)).
  static QLORA_INLINE Vec exponential(Vec gate) {
    return exp(mul(gate, fma(mul(gate, gate), set1(-0.07135481627f), set1(-1.595769122f))));
  }
  static QLORA_INLINE Vec at_most_10(Vec gate) {
    return add(max(set1(-10.0f), min(set1(10.0f), gate)), sub(gate, gate));  // infinity becomes NaN: it is not hidden
  }
  static QLORA_INLINE Vec of(Vec gate) {
    return div(max(set1(-10.0f), gate), add(set1(1.0f), exponential(at_most_10(gate))));
  }
  // The activation and its derivative q + gate q (1 - q) du, du that of 2 u; 1 - q is q e^(-2 u).
  static QLORA_INLINE Vec with_slope(Vec gate, Vec& slope) {
    const Vec near = at_most_10(gate), e = exponential(near), q = div(set1(1.0f), add(set1(1.0f), e));
    const Vec du = fma(mul(near, near), set1(0.2140644488f), set1(1.595769122f));
    slope = fma(mul(near, q), mul(mul(q, e), du), q);
    return mul(max(set1(-10.0f), gate), q);
  }
};

// y = activation(gate) * up, rounded once.
template <class A, class T>
inline void gated(const T* gate, const T* up, T* y, int64_t n) {
  each_vector(n, [&](int64_t i, auto at) { at.store(y + i, mul(A::of(at.load(gate + i)), at.load(up + i))); });
}

// dup = activation(gate) dy, dgate = dy up times the slope.
template <class A, class T>
inline void gated_grad(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n) {
  each_vector(n, [&](int64_t i, auto at) {
    Vec slope;
    const Vec d = at.load(dy + i), u = at.load(up + i), value = A::with_slope(at.load(gate + i), slope);
    at.store(dup + i, mul(value, d));
    at.store(dgate + i, mul(mul(d, u), slope));
  });
}

// The table's functions, for each type.
inline void rms_norm_of(int type, int weight_type, const void* x, const void* weight, void* y, float* scale, int64_t rows, int64_t size,
                        float epsilon) {
  if (type == kF32)
    rms_norm(static_cast<const float*>(x), static_cast<const float*>(weight), static_cast<float*>(y), scale, rows, size, epsilon);
  else if (weight_type == kF32)
    rms_norm(static_cast<const bf16*>(x), static_cast<const float*>(weight), static_cast<bf16*>(y), scale, rows, size, epsilon);
  else
    rms_norm(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), static_cast<bf16*>(y), scale, rows, size, epsilon);
}

template <class T, class W>
inline void rms_norm_grad_as(const void* x, const void* weight, const float* scale, const void* dy, void* dx, int64_t rows,
                             int64_t size) {
  rms_norm_grad(static_cast<const T*>(x), static_cast<const W*>(weight), scale, static_cast<const T*>(dy), static_cast<T*>(dx), rows,
                size);
}

inline void rms_norm_grad_of(int type, int weight_type, const void* x, const void* weight, const float* scale, const void* dy,
                             void* dx, int64_t rows, int64_t size) {
  if (type == kF32)
    rms_norm_grad_as<float, float>(x, weight, scale, dy, dx, rows, size);
  else if (weight_type == kF32)
    rms_norm_grad_as<bf16, float>(x, weight, scale, dy, dx, rows, size);
  else
    rms_norm_grad_as<bf16, bf16>(x, weight, scale, dy, dx, rows, size);
}

template <class A>
inline void gated_as(int type, const void* gate, const void* up, void* y, int64_t n) {
  if (type == kBf16)
    gated<A>(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<bf16*>(y), n);
  else
    gated<A>(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(y), n);
}

template <class A>
inline void gated_grad_as(int type, const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n) {
  if (type == kBf16)
    gated_grad<A>(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<const bf16*>(dy),
                  static_cast<bf16*>(dgate), static_cast<bf16*>(dup), n);
  else
    gated_grad<A>(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<const float*>(dy),
                  static_cast<float*>(dgate), static_cast<float*>(dup), n);
}

inline void gated_of(int type, int activation, const void* gate, const void* up, void* y, int64_t n) {
  if (activation == kGeluTanh)
    gated_as<GeluTanh>(type, gate, up, y, n);
  else
    gated_as<Silu>(type, gate, up, y, n);
}

inline void gated_grad_of(int type, int activation, const void* gate, const void* up, const void* dy, void* dgate, void* dup,
                          int64_t n) {
  if (activation == kGeluTanh)
    gated_grad_as<GeluTanh>(type, gate, up, dy, dgate, dup, n);
  else
    gated_grad_as<Silu>(type, gate, up, dy, dgate, dup, n);
}

}  // namespace qlora::QLORA_TIER
