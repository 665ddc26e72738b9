// How kernels are launched and checked. Every .cu file includes this header and no other header of
// CUDA, so that the tests can compile the same kernels for the host (tests/gpu/host_cuda) and run
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

// As FASTRL_LAUNCH, with `cluster` consecutive blocks of the grid as one cluster (see cluster.cuh).
#define FASTRL_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  fastrl::cuda::launch_cluster(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__)
#endif

#include <stdexcept>
#include <string>
#include <vector>

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
#ifdef FASTRL_CUDA_ON_HOST
  constexpr int64_t kMaxGrid = 40;  // so that tests go through the loops
#else
  constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
#endif
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

// What decides how a row is kept on chip.
struct DeviceLimits {
  size_t shared_bytes;  // of dynamic shared memory a block
  bool clusters;
};

#ifdef FASTRL_CUDA_ON_HOST
inline DeviceLimits device_limits() { return {host_cuda::shared_limit, host_cuda::has_clusters}; }

template <typename Kernel>
bool compiled_for_clusters(Kernel) {
  return true;
}
#else
inline DeviceLimits device_limits() {
  static const std::vector<DeviceLimits> limits = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<DeviceLimits> found(count);
    for (int device = 0; device < count; ++device) {
      int bytes = 0, clusters = 0;
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
      found[device] = {static_cast<size_t>(bytes), clusters != 0};
    }
    return found;
  }();
  int device = 0;
  cudaGetDevice(&device);
  return limits.at(device);
}

// Whether the code that the current device runs was compiled for clusters: a build for sm_80 alone
// runs on newer devices too.
template <typename... Parameters>
bool compiled_for_clusters(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

template <typename... Parameters, typename... Arguments>
void launch_cluster(void (*kernel)(Parameters...), unsigned cluster, unsigned grid, unsigned block,
                    size_t shared_bytes, void* stream, Arguments... arguments) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  // As much as the device has: another thread may be between here and its launch with more than
  // this one needs. A failure shows in the launch.
  if (shared_bytes > kAlwaysAllowed) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(device_limits().shared_bytes));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#endif

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace fastrl::cuda
