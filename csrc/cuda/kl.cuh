// Estimates of KL divergence from log-ratios.
#pragma once

#include "launch.h"

namespace fastrl::cuda {

constexpr float kMaxLogRatio = 20.0f;  // e^20 = 4.9e8; see MAX_LOG_RATIO in fastrl/constants.py

// NaN stays NaN.
__host__ __device__ inline float clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

// exp_d - 1 - d for exp_d = e^d: never negative; a Taylor polynomial keeps the digits for small d.
__host__ __device__ inline float exp_minus_linear(float d, float exp_d) {
  if (!(d < 0.5f && d > -0.5f)) return exp_d - 1.0f - d;
  float p = 1.0f / 362880;
  p = p * d + 1.0f / 40320;
  p = p * d + 1.0f / 5040;
  p = p * d + 1.0f / 720;
  p = p * d + 1.0f / 120;
  p = p * d + 1.0f / 24;
  p = p * d + 1.0f / 6;
  p = p * d + 0.5f;
  return p * d * d;
}

// The estimator of the given number (1, 2 or 3) from k1 = logprob - ref_logprob.
__host__ __device__ inline float kl_estimate(float k1, int estimator) {
  if (estimator == 1) return k1;
  if (estimator == 2) return 0.5f * k1 * k1;
  return exp_minus_linear(-k1, expf(-k1 > kMaxLogRatio ? kMaxLogRatio : -k1));
}

}  // namespace fastrl::cuda
