// Elements of memory as fp32 in registers and back, one or sixteen bytes at a time.
#pragma once

#include "../dtypes.h"
#include "launch.h"

namespace fastrl::cuda {

__host__ __device__ inline float to_float(float x) { return x; }

__host__ __device__ inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

__device__ inline float to_float(fp16 x) { return fp16_to_float(x.bits); }

// Rounds to nearest even; NaN stays NaN.
template <typename T>
__device__ inline T from_float(float x);

template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return {float_to_bf16(x)};
}

template <>
__device__ inline fp16 from_float<fp16>(float x) {
  return {float_to_fp16(x)};
}

// Sixteen bytes of elements: the widest access of one thread.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

}  // namespace fastrl::cuda
