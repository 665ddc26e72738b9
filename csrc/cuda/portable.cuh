// What a GPU does and a host does not, and the only header that knows of both. The tests compile
// the kernels for the host, where tests/gpu/host_cuda stands in for everything below #else.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrl::cuda {

// What decides how a row is kept on chip.
struct DeviceLimits {
  size_t shared_bytes;  // of dynamic shared memory a block
  bool clusters;
};

}  // namespace fastrl::cuda

#ifdef FASTRL_CUDA_ON_HOST
#include "substitutes.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <vector>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "mma.cuh"

#define FASTRL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// The block's dynamic shared memory, 16-byte aligned.
#define FASTRL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// As FASTRL_LAUNCH, with `cluster` consecutive blocks of the grid as one cluster (see cluster.cuh).
#define FASTRL_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  fastrl::cuda::launch_cluster(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace fastrl::cuda {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

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

// Between fp32 and the bits of the 16-bit formats, to nearest even; NaN stays NaN.
__device__ inline float fp16_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ inline uint16_t float_to_fp16(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t float_to_bf16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// The larger of both pairs of elements in two words, of T = bf16 or fp16; NaN if either is.
template <typename T>
__device__ inline uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  uint32_t larger;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
}

// The larger; NaN if either is.
__device__ inline float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// 2^x with a relative error of 2^-22.5; 0 where the result would be denormal.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastrl::cuda

#endif
