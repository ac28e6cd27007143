// The output head's losses and probabilities, in place of its logits.
#pragma once
#include "elementwise.hpp"

namespace qlora::QLORA_TIER {

// The sum over a row of e^(x - most). Pieces are summed in fp32, and they in fp64: a vocabulary is long.
template <class T>
inline double sum_of_exponentials(const T* x, Vec most, int64_t words) {
  constexpr int64_t kPiece = 1024;
  double total = 0;
  for (int64_t start = 0; start < words; start += kPiece) {
    Vec parts[4] = {zero(), zero(), zero(), zero()};
    each_vector(least(kPiece, words - start), [&](int64_t i, auto at) {
      Vec e = exp(sub(at.load(x + start + i), most));
      if constexpr (requires { at.n; }) {  // what is not there counts as nothing, not as e^(0 - most)
        float kept[Vec::width];
        store(kept, e);
        for (int64_t j = at.n; j < Vec::width; ++j) kept[j] = 0;
        e = load(kept);
      }
      Vec& part = parts[i / Vec::width % 4];
      part = add(part, e);
    });
    total += static_cast<double>(sum_of(parts));
  }
  return total;
}

// Of each row of logits: total = the sum of e^(x - top), distance = top - x at the target; the loss is their log and
// sum. With `gradient` the logits become e^(x - top) / total, less 1 at the target.
template <class T>
inline void cross_entropy(T* logits, const int64_t* targets, float* total, float* distance, int64_t begin, int64_t end, int64_t words,
                          bool gradient) {
  const DenormalsAreZero mode;  // which an unlikely word's probability becomes
  for (int64_t row = begin; row < end; ++row) {
    T* const x = logits + row * words;
    Vec tops = set1(-__builtin_inff());
    float rest = -__builtin_inff();
    each_vector(words, [&](int64_t i, auto at) {
      if constexpr (requires { at.n; }) {
        float last[Vec::width];
        store(last, at.load(x + i));
        for (int64_t j = 0; j < at.n; ++j) rest = last[j] > rest ? last[j] : rest;
      } else {
        tops = max(at.load(x + i), tops);  // passes over NaN, which the exponentials then meet
      }
    });
    const float top = largest(max(tops, set1(rest)));
    const Vec most = set1(top);
    const double sum = sum_of_exponentials(x, most, words);
    float at_target[Vec::width];
    store(at_target, load(x + targets[row], 1));
    total[row] = static_cast<float>(sum);
    distance[row] = top - at_target[0];
    if (!gradient) continue;
    const Vec factor = set1(static_cast<float>(1.0 / sum));
    // The target's word is taken out of its vector: e^(x - top) / total - 1 is rounded once.
    const Vec target = sub(mul(exp(sub(load(x + targets[row], 1), most)), factor), set1(1.0f));
    each_vector(words, [&](int64_t i, auto at) { at.store(x + i, mul(exp(sub(at.load(x + i), most)), factor)); });
    store(x + targets[row], target, 1);
  }
}

inline void cross_entropy_of(int type, void* logits, const int64_t* targets, float* total, float* distance, int64_t begin,
                             int64_t end, int64_t words, bool gradient) {
  if (type == kBf16)
    cross_entropy(static_cast<bf16*>(logits), targets, total, distance, begin, end, words, gradient);
  else
    cross_entropy(static_cast<float*>(logits), targets, total, distance, begin, end, words, gradient);
}

}  // namespace qlora::QLORA_TIER
