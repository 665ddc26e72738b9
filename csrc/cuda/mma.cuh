// One warp's product of a 16 x 16 and a 16 x 8 matrix of bf16 or fp16, on the tensor cores.
//
// With lane = 4 g + t, a lane holds, two elements to a word (PTX ISA, mma.m16n8k16):
//   a: columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of both
//   b: rows 2t, 2t + 1 of column g, then rows 2t + 8, 2t + 9
//   c: columns 2t, 2t + 1 of row g, then of row g + 8, in fp32
#pragma once

#include <cuda_runtime.h>

#include "../dtypes.h"

namespace fastrl::cuda {

// c += a b
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace fastrl::cuda
