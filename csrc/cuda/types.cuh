// Elements of memory as fp32 in registers and back, one or sixteen bytes at a time.
#pragma once

#include "../dtypes.h"
#include "launch.h"

#ifndef FASTRL_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastrl::cuda {

__host__ __device__ inline float to_float(float x) { return x; }

__host__ __device__ inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

#ifdef FASTRL_CUDA_ON_HOST
inline float to_float(fp16 x) {
  _Float16 value;
  memcpy(&value, &x, sizeof(value));
  return static_cast<float>(value);
}
#else
__device__ inline float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
#endif

// Rounds to nearest even; NaN stays NaN.
template <typename T>
__device__ inline T from_float(float x);

template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

#ifdef FASTRL_CUDA_ON_HOST
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  fp16 out;
  memcpy(&out, &value, sizeof(out));
  return out;
}
#else
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <>
__device__ inline fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#endif

// Sixteen bytes of elements: the widest access of one thread.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

}  // namespace fastrl::cuda
