// A tier's table. Included by tier_*.cpp alone, after QLORA_TIER is defined (see simd.hpp).
#pragma once
#include "tier.hpp"
//
#include "linear.hpp"
#include "sum_of_outer.hpp"
#include "passes_body.hpp"
#include "vector_checks.hpp"

namespace qlora::QLORA_TIER {

extern const Tier tier;
const Tier tier = {
    .linear = linear,
    .sum_of_outer = sum_of_outer,
    .to_bf16 = to_bf16,
    .from_bf16 = from_bf16,
    .exp2 = exp2_of,
    .reduce = reduce,
};

}  // namespace qlora::QLORA_TIER
