// How kernels are launched and checked. Every .cu file includes this header and no other header of
// CUDA, so that the tests can compile the same kernels for the host (tests/gpu/host_cuda) and run
// them without a GPU.
#pragma once

#include <stdexcept>
#include <string>

#include "portable.cuh"

namespace fastrl::cuda {

// Turns a launch that CUDA refused into an exception that names the op; never waits for the kernel.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  }
}

// A grid for so many blocks of work; a kernel that may get more loops over them.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace fastrl::cuda
