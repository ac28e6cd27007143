#define QLORA_TIER avx512
#include "tier_body.hpp"
