// The passes as ctypes calls them: see api.cpp. Work is cut so that no number depends on how many threads there are.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "passes.hpp"
#include "threads.hpp"

namespace {

using qlora::parallel_for;
using qlora::Passes;

enum Status { ok = 0, no_such_tier = 1, no_memory = 2 };

const Passes* const kTables[] = {
    &qlora::avx2::passes,     &qlora::avx512::passes,       &qlora::avx512_bf16::passes,
    &qlora::amx_bf16::passes, &qlora::amx_emulated::passes,
};

const Passes* table_of(int number) {
  return number < 0 || number >= static_cast<int>(sizeof kTables / sizeof *kTables) ? nullptr : kTables[number];
}

// Elements that are worth a second thread.
constexpr int64_t kGrain = 16384;

int worthwhile(int threads, int64_t elements) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, elements / kGrain)));
}

const char* at(int type, const void* p, int64_t i) { return static_cast<const char*>(p) + i * (type == qlora::kBf16 ? 2 : 4); }
char* at(int type, void* p, int64_t i) { return static_cast<char*>(p) + i * (type == qlora::kBf16 ? 2 : 4); }

// Vectors of n elements, cut at multiples of 64.
template <class Body>
void over_elements(int threads, int64_t n, Body body) {
  parallel_for(worthwhile(threads, n), (n + 63) / 64, [&](int64_t begin, int64_t end) { body(64 * begin, std::min(64 * end, n) - 64 * begin); });
}

using Task = bool (*)(const qlora::Attention&, const qlora::AttentionTask&);

// All tasks of an attention, the longest first, each thread taking the next when it has ended one.
int over_tasks(int threads, const qlora::Attention& attention, const int64_t* lengths, int64_t samples, Task run) {
  const int64_t count = samples * attention.key_heads;
  auto* tasks = static_cast<qlora::AttentionTask*>(
      qlora::scratch(qlora::Slot::call, static_cast<size_t>(count) * sizeof(qlora::AttentionTask)));
  if (!tasks) return no_memory;
  int64_t start = 0, filled = 0;
  for (int64_t sample = 0; sample < samples; start += lengths[sample++])
    for (int head = 0; head < attention.key_heads; ++head) tasks[filled++] = {start, lengths[sample], head};
  std::sort(tasks, tasks + count, [](const auto& a, const auto& b) {
    return std::tie(b.length, a.start, a.key_head) < std::tie(a.length, b.start, b.key_head);
  });
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const int takers = static_cast<int>(std::min<int64_t>(threads, count));
  parallel_for(takers, takers, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i = next++; i < count; i = next++)
        if (!run(attention, tasks[i])) failed = true;
  });
  return failed ? no_memory : ok;
}

}  // namespace

#define QLORA_API extern "C" __attribute__((visibility("default")))

// `finite` becomes whether all weights are.
QLORA_API int qlora_quantize_nf4(int tier, int threads, int type, const void* weights, int64_t count, uint8_t* packed, float* absmax,
                                 int* finite) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  std::atomic<bool> all{true};
  parallel_for(worthwhile(threads, count), (count + 63) / 64, [&](int64_t begin, int64_t end) {
    if (!passes->quantize_nf4(type, weights, count, begin, end, packed, absmax)) all = false;
  });
  *finite = all;
  return ok;
}

QLORA_API int qlora_rms_norm(int tier, int threads, int type, int weight_type, const void* x, const void* weight, void* y,
                             float* scale, int64_t rows, int64_t size, float epsilon) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  parallel_for(worthwhile(threads, rows * size), rows, [&](int64_t begin, int64_t end) {
    passes->rms_norm(type, weight_type, at(type, x, begin * size), weight, at(type, y, begin * size), scale + begin, end - begin, size,
                     epsilon);
  });
  return ok;
}

QLORA_API int qlora_rms_norm_grad(int tier, int threads, int type, int weight_type, const void* x, const void* weight,
                                  const float* scale, const void* dy, void* dx, int64_t rows, int64_t size) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  parallel_for(worthwhile(threads, rows * size), rows, [&](int64_t begin, int64_t end) {
    passes->rms_norm_grad(type, weight_type, at(type, x, begin * size), weight, scale + begin, at(type, dy, begin * size),
                          at(type, dx, begin * size), end - begin, size);
  });
  return ok;
}

QLORA_API int qlora_gated(int tier, int threads, int type, int activation, const void* gate, const void* up, void* y, int64_t n) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  over_elements(threads, n, [&](int64_t i, int64_t count) {
    passes->gated(type, activation, at(type, gate, i), at(type, up, i), at(type, y, i), count);
  });
  return ok;
}

QLORA_API int qlora_gated_grad(int tier, int threads, int type, int activation, const void* gate, const void* up, const void* dy,
                               void* dgate, void* dup, int64_t n) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  over_elements(threads, n, [&](int64_t i, int64_t count) {
    passes->gated_grad(type, activation, at(type, gate, i), at(type, up, i), at(type, dy, i), at(type, dgate, i), at(type, dup, i),
                       count);
  });
  return ok;
}

QLORA_API int qlora_attention(int tier, int threads, const qlora::Attention* attention, const int64_t* lengths, int64_t samples) {
  const Passes* passes = table_of(tier);
  return passes ? over_tasks(threads, *attention, lengths, samples, passes->attention) : no_such_tier;
}

QLORA_API int qlora_attention_grad(int tier, int threads, const qlora::Attention* attention, const int64_t* lengths, int64_t samples) {
  const Passes* passes = table_of(tier);
  return passes ? over_tasks(threads, *attention, lengths, samples, passes->attention_grad) : no_such_tier;
}

QLORA_API int qlora_cross_entropy(int tier, int threads, int type, void* logits, const int64_t* targets, float* total, float* distance,
                                  int64_t rows, int64_t words, int gradient) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  parallel_for(worthwhile(threads, rows * words), rows, [&](int64_t begin, int64_t end) {
    passes->cross_entropy(type, logits, targets, total, distance, begin, end, words, gradient != 0);
  });
  return ok;
}

QLORA_API int qlora_dropout(int tier, int threads, int type, const void* x, void* y, uint64_t key, uint32_t threshold, float factor,
                            int64_t rows, int64_t columns, int add) {
  const Passes* passes = table_of(tier);
  if (!passes) return no_such_tier;
  parallel_for(worthwhile(threads, rows * columns), rows, [&](int64_t begin, int64_t end) {
    passes->dropout(type, x, y, key, threshold, factor, begin, end, columns, add != 0);
  });
  return ok;
}
