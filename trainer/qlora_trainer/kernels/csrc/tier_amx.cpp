#define QLORA_TIER amx_bf16
#define QLORA_TILES 1
#include "tier_body.hpp"
