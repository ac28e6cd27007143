#define QLORA_TIER avx2
#include "tier_body.hpp"
