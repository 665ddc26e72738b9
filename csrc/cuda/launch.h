// How kernels are launched and checked. Every .cu file includes this header and no other header of
// CUDA, so that the tests can compile the same kernels for the host (tests/gpu/host_cuda.h) and run
// them without a GPU.
#pragma once

#ifdef FASTRL_CUDA_ON_HOST
#include "host_cuda.h"
#else
#include <cuda_runtime.h>

#define FASTRL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// The block's dynamic shared memory, 16-byte aligned.
#define FASTRL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <stdexcept>
#include <string>

namespace fastrl::cuda {

// Turns a launch that CUDA refused into an exception that names the op; never waits for the kernel.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  }
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace fastrl::cuda
