// Count, mean and sum of squared deviations, combined from parts in a fixed order.
#pragma once

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

// Moments of get(i, lanes), the vector of elements i.. of which `kept` are kept by the mask. Two
// sweeps over data that is in the L1 cache.
template <typename Get>
Moments moments_of(const bool* mask, int64_t size, int64_t kept, Get&& get) {
  if (kept == 0) return {};
  vfloat sum = broadcast(0.0f), squares = broadcast(0.0f);
  auto sweep = [&](auto&& body) {
    for_each_vector(
        size, [&](int64_t i, auto lanes) { body(load_flags(mask + i, lanes), get(i, lanes)); });
  };
  sweep([&](vint keep, vfloat x) { sum += select(keep, x); });
  const double mean = reduce_add_double(sum) / kept;
  const float center = static_cast<float>(mean);
  sweep([&](vint keep, vfloat x) {
    vfloat d = select(keep, x - center);
    squares += d * d;
  });
  // The deviations are from the rounded mean; their own mean squared is what that adds.
  const double rest = mean - center;
  const double m2 = reduce_add_double(squares) - kept * rest * rest;
  return {static_cast<double>(kept), mean, m2 < 0 ? 0.0 : m2};
}

// 1 - residual / total, 0 where there is no variance to explain.
inline float explained_variance(double residual, double total) {
  return total == 0 ? 0.0f : static_cast<float>(1.0 - residual / total);
}

}  // namespace fastrl::cpu::FASTRL_ISA
