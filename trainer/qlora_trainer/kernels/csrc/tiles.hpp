// The tile unit (AMX): eight tiles of 16 rows of 64 bytes. Only with QLORA_TILES, which is 1 for the processor's unit and
// 2 for the same in plain C++.
//
// A Tiles object holds the thread's tiles from its making to its end: other code on the thread, such as torch's, has
// configurations of its own, so that nothing is expected to survive between calls. The kernel's permission to use the unit
// (library.py asks for it) holds for all threads of the process.
#pragma once
#include "simd.hpp"

#ifdef QLORA_TILES

namespace qlora::QLORA_TIER {

struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);

#if QLORA_TILES == 1

// In assembly, since some compilers' intrinsics take a tile's number as text alone, and do not say that they touch memory.
class Tiles {
 public:
  QLORA_INLINE Tiles() {
    const TileConfiguration all;
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  QLORA_INLINE ~Tiles() { asm volatile("tilerelease" ::: "memory"); }

  template <int t>
  QLORA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  // From rows `stride` bytes apart.
  template <int t>
  QLORA_INLINE void load(const float* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  // The same, with the hint that they are not needed again soon.
  template <int t>
  QLORA_INLINE void stream(const float* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  QLORA_INLINE void store(float* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  // c += a b: c 16 x 16 floats, a 16 rows of 16 pairs of bf16, b 16 pairs of rows of 16 columns.
  template <int c, int a, int b>
  QLORA_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

#else

class Tiles {
  float tile_[8][16][16];  // as dwords

  static float lower(float dword) { return half(dword, 16); }
  static float upper(float dword) { return half(dword, 0); }
  static float half(float dword, int shift) {
    uint32_t bits;
    __builtin_memcpy(&bits, &dword, sizeof bits);
    bits = bits << shift & 0xffff0000u;
    __builtin_memcpy(&dword, &bits, sizeof bits);
    return dword;
  }

 public:
  // Tiles hold garbage until they are loaded: what is used without that shows.
  Tiles() { __builtin_memset(tile_, 0xff, sizeof tile_); }

  template <int t>
  void zero() {
    __builtin_memset(tile_[t], 0, sizeof tile_[t]);
  }
  template <int t>
  void load(const float* p, int64_t stride) {
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(tile_[t][row], reinterpret_cast<const char*>(p) + row * stride, sizeof tile_[t][row]);
  }
  template <int t>
  void stream(const float* p, int64_t stride) {
    load<t>(p, stride);
  }
  template <int t>
  void store(float* p, int64_t stride) {
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(reinterpret_cast<char*>(p) + row * stride, tile_[t][row], sizeof tile_[t][row]);
  }
  // As TDPBF16PS computes: the products of lower and of upper halves are summed apart, each in order by fused
  // multiply-adds, their sum is added to c, and denormals are zeros (the caller has set that).
  template <int c, int a, int b>
  void multiply() {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 16; ++column) {
        float low = 0, high = 0;
        for (int pair = 0; pair < 16; ++pair) {
          low = __builtin_fmaf(lower(tile_[a][row][pair]), lower(tile_[b][pair][column]), low);
          high = __builtin_fmaf(upper(tile_[a][row][pair]), upper(tile_[b][pair][column]), high);
        }
        tile_[c][row][column] += low + high;
      }
  }
};

#endif

}  // namespace qlora::QLORA_TIER

#endif
