// What a communication library has to offer for a c10d backend.
#pragma once

#include <cstddef>

#include <c10/core/ScalarType.h>

namespace qlora {

enum class Reduction { sum, product, min, max };

// One group's collectives over memory. Each blocks, is called by every rank of the group in the
// same order, by one thread at a time, and throws std::exception when it fails.
struct Transport {
  virtual ~Transport() = default;
  // In place. Throws for a type that it cannot reduce.
  virtual void all_reduce(void* data, std::size_t count, c10::ScalarType type, Reduction reduction) = 0;
  virtual void broadcast(void* data, std::size_t bytes, int root) = 0;
  // `all` has room for `bytes` of each rank.
  virtual void all_gather(const void* own, void* all, std::size_t bytes) = 0;
  virtual void barrier() = 0;
};

}  // namespace qlora
