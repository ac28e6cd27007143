// What every tier implements: a table of functions, and which tiers there are.
#pragma once
#include <cstdint>

namespace qlora {

struct bf16;

struct Tier {
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
