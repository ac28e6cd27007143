// The passes of a training step beside its matrix products: a table of functions per tier.
#pragma once
#include <cstdint>

namespace qlora {

// What activations are stored as; all arithmetic is fp32.
enum Type { kF32 = 0, kBf16 = 1 };

// What a gate's numbers go through.
enum Activation { kSilu = 0, kGeluTanh = 1 };

// Packed causal attention: what its calls have in common. Strides are in elements; heads of a token's output and of
// gradients lie one after another, tokens after that.
struct Attention {
  int type;
  int heads, key_heads, head_size;
  int64_t tokens;
  int64_t window;  // tokens that a token sees, itself included; 0: all before it
  float scale;
  float softcap;  // scores s become softcap tanh(s / softcap); 0: they stay
  struct Rows {
    const void* data;
    int64_t head, token;
  } query, key, value, gradient;  // gradient: of the output
  void* output;                   // (tokens, heads, head size)
  float* statistics;              // (2, heads, tokens): each row's largest score, and 1 / its sum of exponentials
  void *dquery, *dkey, *dvalue;   // (tokens, heads or key heads, head size)
};

// A sample's part of an attention: its tokens, and a head of keys with the heads of queries that read it.
struct AttentionTask {
  int64_t start, length;
  int key_head;
};

struct Passes {
  // Blocks [begin, end) of `count` weights; false where one is not finite.
  bool (*quantize_nf4)(int type, const void* weights, int64_t count, int64_t begin, int64_t end, uint8_t* packed, float* absmax);
  // Rows of `size`.
  void (*rms_norm)(int type, int weight_type, const void* x, const void* weight, void* y, float* scale, int64_t rows, int64_t size,
                   float epsilon);
  void (*rms_norm_grad)(int type, int weight_type, const void* x, const void* weight, const float* scale, const void* dy, void* dx,
                        int64_t rows, int64_t size);
  void (*gated)(int type, int activation, const void* gate, const void* up, void* y, int64_t n);
  void (*gated_grad)(int type, int activation, const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t n);
  // One task; false without memory for scratch.
  bool (*attention)(const Attention& attention, const AttentionTask& task);
  bool (*attention_grad)(const Attention& attention, const AttentionTask& task);
  // Rows [begin, end) of logits (rows, words); with `gradient` they become probabilities - onehot.
  void (*cross_entropy)(int type, void* logits, const int64_t* targets, float* total, float* distance, int64_t begin, int64_t end,
                        int64_t words, bool gradient);
  // Rows [begin, end) of a bin (rows, columns): y = mask x, or y += mask x.
  void (*dropout)(int type, const void* x, void* y, uint64_t key, uint32_t threshold, float factor, int64_t begin, int64_t end,
                  int64_t columns, bool add);
};

namespace avx2 {
extern const Passes passes;
}
namespace avx512 {
extern const Passes passes;
}
namespace avx512_bf16 {
extern const Passes passes;
}
namespace amx_bf16 {
extern const Passes passes;
}
namespace amx_emulated {
extern const Passes passes;
}

}  // namespace qlora
