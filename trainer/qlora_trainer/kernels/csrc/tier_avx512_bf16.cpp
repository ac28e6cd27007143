#define QLORA_TIER avx512_bf16
#include "tier_body.hpp"
