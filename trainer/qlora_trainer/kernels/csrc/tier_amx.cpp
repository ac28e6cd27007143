#define QLORA_TIER amx_bf16
#include "tier_body.hpp"
