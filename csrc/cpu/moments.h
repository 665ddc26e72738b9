// Count, mean and sum of squared deviations, combined from parts in a fixed order.
#pragma once

#include <array>

#include "masks.h"

namespace fastrl::cpu::FASTRL_ISA {

struct Moments {
  double n = 0.0, mean = 0.0, m2 = 0.0;

  double variance() const { return n > 0 ? m2 / n : 0.0; }

  // Chan, Golub and LeVeque 1983.
  void add(const Moments& other) {
    if (other.n == 0) return;
    const double total = n + other.n, share = other.n / total, difference = other.mean - mean;
    m2 += other.m2 + difference * difference * n * share;
    mean += difference * share;
    n = total;
  }
};

// Moments of N quantities over the kept elements; get(i, lanes, x) fills x with the vectors of
// elements i... Two sweeps over data that is in the L1 cache.
template <int N, typename Get>
std::array<Moments, N> moments_of(const bool* mask, int64_t size, Get&& get) {
  vint negative_counts{};
  vfloat sums[N], squares[N], centers[N];
  for (int k = 0; k < N; ++k) sums[k] = squares[k] = broadcast(0.0f);
  for_each_vector(size, [&](int64_t i, auto lanes) {
    const vint keep = load_flags(mask + i, lanes);
    negative_counts += keep;
    vfloat x[N];
    get(i, lanes, x);
    for (int k = 0; k < N; ++k) sums[k] += select(keep, x[k]);
  });
  const double kept = -reduce_add(negative_counts);
  std::array<Moments, N> moments;
  if (kept == 0) return moments;
  for (int k = 0; k < N; ++k) {
    moments[k].n = kept;
    moments[k].mean = reduce_add_double(sums[k]) / kept;
    centers[k] = broadcast(static_cast<float>(moments[k].mean));
  }
  for_each_vector(size, [&](int64_t i, auto lanes) {
    const vint keep = load_flags(mask + i, lanes);
    vfloat x[N];
    get(i, lanes, x);
    for (int k = 0; k < N; ++k) {
      const vfloat d = select(keep, x[k] - centers[k]);
      squares[k] += d * d;
    }
  });
  for (int k = 0; k < N; ++k) {
    // The deviations are from the rounded mean; its rounding adds its square each time.
    const double rounding = moments[k].mean - centers[k][0];
    const double m2 = reduce_add_double(squares[k]) - kept * rounding * rounding;
    moments[k].m2 = m2 < 0 ? 0.0 : m2;
  }
  return moments;
}

// 1 - residual / total; 0 where there is no variance to explain, but for the rounding of the mean.
inline float explained_variance(double residual, double total, double mean) {
  const double rounding = 1e-6 * mean;
  return total <= rounding * rounding ? 0.0f : static_cast<float>(1.0 - residual / total);
}

}  // namespace fastrl::cpu::FASTRL_ISA
