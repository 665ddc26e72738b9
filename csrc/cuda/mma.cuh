// One warp's product of a 16 x 16 and a 16 x 8 matrix of bf16 or fp16, on the tensor cores.
//
// With lane = 4 g + t, a lane holds, two elements to a word (PTX ISA, mma.m16n8k16):
//   a: columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of both
//   b: rows 2t, 2t + 1 of column g, then rows 2t + 8, 2t + 9
//   c: columns 2t, 2t + 1 of row g, then of row g + 8, in fp32
#pragma once

#include <type_traits>

#include "reduce.cuh"
#include "types.cuh"

namespace fastrl::cuda {

#ifdef FASTRL_CUDA_ON_HOST

template <typename T>
inline float half_of(uint32_t word, int half) {
  return to_float(T{static_cast<uint16_t>(half == 0 ? word : word >> 16)});
}

// Every operand is fetched from the lane that holds it.
template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lefts = host_cuda::gather(std::array<uint32_t, 4>{a[0], a[1], a[2], a[3]});
  const auto rights = host_cuda::gather(std::array<uint32_t, 2>{b[0], b[1]});
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {  // column of a, row of b
      const int holder = k % 8 / 2, high = k / 8;
      const uint32_t left = lefts[4 * g + holder][2 * high + i / 2];
      const uint32_t right = rights[4 * (2 * t + i % 2) + holder][high];
      c[i] += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
    }
  }
}

#else

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

#endif

}  // namespace fastrl::cuda
