#include "threads.hpp"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <new>

namespace qlora {
namespace {

constexpr int kMostThreads = 1024;

// One job at a time. Everything below is read and written under `lock`, which is taken once a range.
struct Pool {
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t work = PTHREAD_COND_INITIALIZER;
  pthread_cond_t done = PTHREAD_COND_INITIALIZER;
  int workers = 0;
  bool busy = false;
  Body body = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  int ranges = 0;      // of the job
  int next = 0;        // the first range that nobody has taken
  int unfinished = 0;  // ranges that have not ended
};

// Never destroyed: workers sleep in it while the process ends.
alignas(Pool) unsigned char pool_memory[sizeof(Pool)];
Pool& pool = *reinterpret_cast<Pool*>(pool_memory);

// Takes ranges until none is left. Called, and returns, with the lock held.
void take_ranges() {
  while (pool.next < pool.ranges) {
    const int64_t range = pool.next++, ranges = pool.ranges, count = pool.count;
    const Body body = pool.body;
    void* const context = pool.context;
    pthread_mutex_unlock(&pool.lock);
    body(context, count * range / ranges, count * (range + 1) / ranges);
    pthread_mutex_lock(&pool.lock);
    if (--pool.unfinished == 0) pthread_cond_signal(&pool.done);
  }
}

void* worker(void*) {
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    take_ranges();
    pthread_cond_wait(&pool.work, &pool.lock);
  }
}

// Starts workers until there are `wanted`, or the system refuses: the calling thread then does more itself. Signals
// are for the program's own threads.
void start_workers(int wanted) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_attr_t detached;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  for (pthread_t thread; pool.workers < wanted; ++pool.workers)
    if (pthread_create(&thread, &detached, worker, nullptr)) break;
  pthread_attr_destroy(&detached);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// A child has the memory of its parent's pool and none of its threads.
void forget_workers() { new (pool_memory) Pool; }

struct Scratch {
  void* memory[static_cast<int>(Slot::count)];
  size_t bytes[static_cast<int>(Slot::count)];
};
pthread_key_t scratch_key;

void free_scratch(void* of_thread) {
  auto* scratch = static_cast<Scratch*>(of_thread);
  for (int i = 0; i < static_cast<int>(Slot::count); ++i)
    if (scratch->bytes[i]) munmap(scratch->memory[i], scratch->bytes[i]);
  free(scratch);
}

__attribute__((constructor)) void on_load() {
  new (pool_memory) Pool;
  pthread_key_create(&scratch_key, free_scratch);
  pthread_atfork(nullptr, nullptr, forget_workers);
}

}  // namespace

void run_ranges(int threads, int64_t count, Body body, void* context) {
  if (count <= 0) return;
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) return body(context, 0, count);
  pthread_mutex_lock(&pool.lock);
  if (pool.busy) {
    pthread_mutex_unlock(&pool.lock);
    return body(context, 0, count);
  }
  pool.busy = true;
  pool.body = body;
  pool.context = context;
  pool.count = count;
  pool.ranges = pool.unfinished = threads;
  pool.next = 0;
  if (pool.workers < threads - 1) start_workers(threads - 1);
  pthread_cond_broadcast(&pool.work);
  take_ranges();
  while (pool.unfinished) pthread_cond_wait(&pool.done, &pool.lock);
  pool.busy = false;
  pthread_mutex_unlock(&pool.lock);
}

void* scratch(Slot slot, size_t bytes) {
  auto* mine = static_cast<Scratch*>(pthread_getspecific(scratch_key));
  if (!mine) {
    mine = static_cast<Scratch*>(calloc(1, sizeof(Scratch)));
    if (!mine || pthread_setspecific(scratch_key, mine)) {
      free(mine);
      return nullptr;
    }
  }
  const int i = static_cast<int>(slot);
  if (mine->bytes[i] < bytes) {
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t unit = bytes < kHuge ? 4096 : kHuge, rounded = (bytes + unit - 1) / unit * unit;
    void* memory = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (unit == kHuge) madvise(memory, rounded, MADV_HUGEPAGE);
    if (mine->bytes[i]) munmap(mine->memory[i], mine->bytes[i]);
    mine->memory[i] = memory;
    mine->bytes[i] = rounded;
  }
  return mine->memory[i];
}

}  // namespace qlora
