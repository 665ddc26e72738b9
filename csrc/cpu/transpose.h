// Transpose of a kLanes x kLanes tile in registers.
#pragma once

#include "simd.h"

namespace fastrl::cpu::FASTRL_ISA {

#if defined(__clang__)
#define FASTRL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower halves.
inline vfloat interleave_low(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return FASTRL_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return FASTRL_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return FASTRL_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

// The same of the upper halves.
inline vfloat interleave_high(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return FASTRL_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return FASTRL_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return FASTRL_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

#undef FASTRL_SHUFFLE

// Seen as one array with address (row, column) in bits, a round of interleaving row i with row
// i + kLanes / 2 rotates the address left by one bit; log2(kLanes) rounds make it (column, row).
inline void transpose(vfloat (&tile)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vfloat next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(tile[i], tile[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(tile[i], tile[i + kLanes / 2]);
    }
    std::memcpy(tile, next, sizeof(next));
  }
}

}  // namespace fastrl::cpu::FASTRL_ISA
