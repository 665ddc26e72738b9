// Reductions over the threads of a warp and of a block, always in the same order.
#pragma once

#include "launch.h"

namespace fastrl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The reduction over the 32 lanes, in every lane. `combine` must be commutative.
template <typename T, typename Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// The reduction over the block's warps (blockDim.x a multiple of 32), in every thread. `scratch`
// holds one T a warp and may be used again after the next __syncthreads().
template <typename T, typename Combine>
__device__ inline T block_reduce(T value, Combine combine, T* scratch) {
  value = warp_reduce(value, combine);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < warps; ++warp) value = combine(value, scratch[warp]);
  return value;
}

}  // namespace fastrl::cuda
