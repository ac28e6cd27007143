// The code of tier_amx.cpp with a tile unit in plain C++, so that it is tested on processors without one.
#define QLORA_TIER amx_emulated
#define QLORA_TILES 2
#include "tier_body.hpp"
