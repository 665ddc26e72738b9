// What csrc/cuda/portable.cuh offers, for kernels that are compiled for the host.
#pragma once

#include "dtypes.h"
#include "host_cuda.h"

#define FASTRL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), host_cuda::launch([=] { (kernel)(__VA_ARGS__); }, grid, 1, block, shared_bytes))
#define FASTRL_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                                     \
   host_cuda::launch([=] { (kernel)(__VA_ARGS__); }, grid, cluster, block, shared_bytes))
#define FASTRL_DYNAMIC_SHARED(name) unsigned char* name = host_cuda::dynamic_shared()

namespace fastrl::cuda {

constexpr int64_t kMaxGrid = 40;  // so that tests go through the loops

inline DeviceLimits device_limits() { return {host_cuda::shared_limit, host_cuda::has_clusters}; }

template <typename Kernel>
bool compiled_for_clusters(Kernel) {
  return true;
}

inline float fp16_to_float(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

inline uint16_t float_to_fp16(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint16_t float_to_bf16(float x) {
  if (x != x) return 0x7fff;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The first or the second element of a word.
template <typename T>
inline float element_of(uint32_t word, int second) {
  const auto bits = static_cast<uint16_t>(second ? word >> 16 : word);
  if constexpr (std::is_same_v<T, fp16>) return fp16_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

template <typename T>
inline uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (int i = 0; i < 2; ++i) {
    const float x = max_or_nan(element_of<T>(a, i), element_of<T>(b, i));
    const uint32_t bits = std::is_same_v<T, bf16> ? float_to_bf16(x) : float_to_fp16(x);
    larger |= bits << 16 * i;
  }
  return larger;
}

inline float exp2_approx(float x) { return std::exp2(x); }

// Every operand is fetched from the lane that holds it.
template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lefts = host_cuda::gather(std::array<uint32_t, 4>{a[0], a[1], a[2], a[3]});
  const auto rights = host_cuda::gather(std::array<uint32_t, 2>{b[0], b[1]});
  const int lane = threadIdx.x % host_cuda::kWarpSize, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {  // column of a, row of b
      const int holder = k % 8 / 2, high = k / 8;
      const uint32_t left = lefts[4 * g + holder][2 * high + i / 2];
      const uint32_t right = rights[4 * (2 * t + i % 2) + holder][high];
      c[i] += element_of<T>(left, k % 2) * element_of<T>(right, k % 2);
    }
  }
}

struct alignas(16) SixteenBytes {
  uint32_t words[4];
};

inline void begin_copy(void* shared, const void* global) {
  *static_cast<SixteenBytes*>(shared) = {~0u, ~0u, ~0u, ~0u};  // NaN until it is waited for
  host_cuda::begin_copy(shared, global);
}

inline void wait_for_copies() {
  void* shared;
  const void* global;
  while (host_cuda::next_copy(shared, global)) {
    *static_cast<SixteenBytes*>(shared) = *static_cast<const SixteenBytes*>(global);
  }
}

inline unsigned cluster_rank() { return host_cuda::cluster_rank(); }
inline unsigned cluster_size() { return host_cuda::cluster_size(); }
inline void cluster_arrive_relaxed() { host_cuda::cluster_arrive(); }
inline void cluster_wait() { host_cuda::cluster_wait(); }
inline void cluster_sync() { host_cuda::cluster_barrier(); }

template <typename T>
T* map_shared(T* p, unsigned rank) {
  return static_cast<T*>(host_cuda::map_shared(p, rank));
}

}  // namespace fastrl::cuda
