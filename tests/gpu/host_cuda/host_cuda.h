// CUDA's vocabulary on the host, for kernels that are compiled as C++ and run by machine.h.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
// Blocks run one after another; clusters must use dynamic shared memory.
#define __shared__ static

using std::max;
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace host_cuda {

template <typename Kernel>
void launch(const Kernel& kernel, dim3 grid, unsigned cluster_size, dim3 block,
            size_t shared_bytes) {
  const auto run = [](const void* kernel) { (*static_cast<const Kernel*>(kernel))(); };
  launch(run, &kernel, sizeof(kernel), grid, cluster_size, block, shared_bytes);
}

// Inlined, so that the machine sees where a kernel calls them.
#define HOST_CUDA_INLINE __attribute__((always_inline)) inline

template <typename T>
HOST_CUDA_INLINE T exchange(T value, int source) {
  exchange(&value, sizeof(value), source);
  return value;
}

template <typename T>
HOST_CUDA_INLINE std::array<T, kWarpSize> gather(const T& value) {
  std::array<T, kWarpSize> values;
  gather(&value, sizeof(value), values.data());
  return values;
}

}  // namespace host_cuda

HOST_CUDA_INLINE void __syncthreads() { host_cuda::block_barrier(); }
HOST_CUDA_INLINE void __syncwarp(unsigned = 0xffffffffu) { host_cuda::warp_barrier(); }

template <typename T>
HOST_CUDA_INLINE T __shfl_sync(unsigned, T value, int source) {
  return host_cuda::exchange(value, source & 31);
}
template <typename T>
HOST_CUDA_INLINE T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::exchange(value, host_cuda::lane() ^ mask);
}
template <typename T>
HOST_CUDA_INLINE T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return host_cuda::exchange(value, host_cuda::lane() + static_cast<int>(delta));
}
HOST_CUDA_INLINE unsigned __ballot_sync(unsigned, int predicate) {
  const auto votes = host_cuda::gather(predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(votes[i]) << i;
  return bits;
}
HOST_CUDA_INLINE int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fdividef(float a, float b) { return a / b; }
