// The library's own threads and scratch memory. Compiled once, for any x86-64.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qlora {

// Cuts [0, count) into `threads` ranges of equal length, the first threads' at the front, and runs body(context, begin,
// end) for each on some thread, the calling one among them. Returns when all have run. The ranges depend on `count` and
// `threads` alone, never on who runs them; a body whose results depend on a range's borders is wrong.
//
// Workers are started when they are first needed, sleep between calls, and are forgotten in a forked child, which starts
// its own. A call while another thread's call is under way runs everything on the calling thread.
using Body = void (*)(void* context, int64_t begin, int64_t end);
void run_ranges(int threads, int64_t count, Body body, void* context);

// The same for a callable body(begin, end).
template <class F>
__attribute__((always_inline)) inline void parallel_for(int threads, int64_t count, F&& body) {
  run_ranges(threads, count, [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); }, &body);
}

// Memory of the calling thread, kept for its next call with the same slot: at least `bytes`, at a multiple of 4,096,
// of undefined content. nullptr when there is none.
enum class Slot { call, strip, sums, scales, pass, inner_strips, inner_sums, inner, count };
void* scratch(Slot slot, size_t bytes);

}  // namespace qlora
