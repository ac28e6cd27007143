// A tier's table of passes. Included by tier_*.cpp alone.
#pragma once
#include "attention_bf16.hpp"
#include "cross_entropy.hpp"
#include "dropout.hpp"
#include "elementwise.hpp"
#include "quantize_nf4.hpp"

namespace qlora::QLORA_TIER {

extern const Passes passes;
const Passes passes = {
    .quantize_nf4 = quantize_nf4_of,
    .rms_norm = rms_norm_of,
    .rms_norm_grad = rms_norm_grad_of,
    .gated = gated_of,
    .gated_grad = gated_grad_of,
    .attention = attention_of,
    .attention_grad = attention_grad_of,
    .cross_entropy = cross_entropy_of,
    .dropout = dropout_of,
};

}  // namespace qlora::QLORA_TIER
