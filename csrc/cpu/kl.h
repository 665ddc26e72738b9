// Estimates of KL divergence from log-ratios.
#pragma once

#include "masks.h"

namespace fastrl::cpu::FASTRL_ISA {

constexpr float kMaxLogRatio = 20.0f;  // e^20 = 4.9e8; see MAX_LOG_RATIO in fastrl/constants.py

// exp_d - 1 - d for exp_d = e^d: never negative; a Taylor polynomial keeps the digits for small d.
inline vfloat exp_minus_linear(vfloat d, vfloat exp_d) {
  vfloat p = broadcast(1.0f / 362880);
  p = p * d + 1.0f / 40320;
  p = p * d + 1.0f / 5040;
  p = p * d + 1.0f / 720;
  p = p * d + 1.0f / 120;
  p = p * d + 1.0f / 24;
  p = p * d + 1.0f / 6;
  p = p * d + 0.5f;
  const vint small = (d < broadcast(0.5f)) & (d > broadcast(-0.5f));
  return small ? p * d * d : exp_d - 1.0f - d;
}

// The estimator of the given number (1, 2 or 3) from k1 = logprob - ref_logprob.
template <int kEstimator>
vfloat kl_estimate(vfloat k1) {
  if constexpr (kEstimator == 1) return k1;
  if constexpr (kEstimator == 2) return 0.5f * k1 * k1;
  return exp_minus_linear(-k1, exp(vmin(broadcast(kMaxLogRatio), -k1)));
}

}  // namespace fastrl::cpu::FASTRL_ISA
