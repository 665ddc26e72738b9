// Sums, means and sums of squared deviations over kept elements, from lanes to warps to blocks to
// the whole, in a fixed order.
#pragma once

#include "reduce.cuh"

namespace fastrl::cuda {

__device__ inline double warp_sum(double x) {
  return warp_reduce(x, [](double a, double b) { return a + b; });
}

// Over the group of `lanes` neighbours (a power of two) that the lane is in, in every lane.
__device__ inline float lanes_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullMask, x, offset);
  }
  return x;
}

struct Moments {
  double mean, m2;
};

__host__ __device__ inline double variance(const Moments& moments, double n) {
  return n > 0 ? moments.m2 / n : 0.0;
}

// Of the kept ones (bits of `kept`) of a group of lanes' kCount elements each, `n` in all. The
// deviations are from the rounded mean; their own mean corrects it.
template <int kCount>
__device__ Moments lanes_moments(const float* x, unsigned kept, float n, int lanes) {
  float sum = 0.0f, deviations = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += (kept >> i & 1u) != 0 ? x[i] : 0.0f;
  const float inverse = 1.0f / fmaxf(n, 1.0f), mean = lanes_sum(sum, lanes) * inverse;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float deviation = (kept >> i & 1u) != 0 ? x[i] - mean : 0.0f;
    deviations += deviation;
    squares += deviation * deviation;
  }
  deviations = lanes_sum(deviations, lanes);
  squares = lanes_sum(squares, lanes);
  const float correction = deviations * inverse, m2 = squares - deviations * correction;
  // An infinite mean has no deviations.
  return {correction == correction ? static_cast<double>(mean) + correction : mean,
          m2 < 0.0f ? 0.0 : m2};
}

// What is known of one part of the elements: kSums sums, the count, and the moments of two
// quantities. It holds no element yet if n is 0.
template <int kSums>
struct Part {
  double sums[kSums];
  double n;
  Moments moments[2];

  static constexpr int kColumns = kSums + 5;

  __device__ static Part empty() {
    Part part;
#pragma unroll
    for (double& sum : part.sums) sum = 0.0;
    part.n = 0.0;
    part.moments[0] = part.moments[1] = {0.0, 0.0};
    return part;
  }

  // Chan, Golub and LeVeque 1983.
  __device__ void add(const Part& other) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += other.sums[k];
    if (other.n == 0.0) return;
    const double total = n + other.n, share = other.n / total;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const double difference = other.moments[k].mean - moments[k].mean;
      moments[k].m2 += other.moments[k].m2 + difference * difference * n * share;
      moments[k].mean = n == 0.0 ? other.moments[k].mean : moments[k].mean + difference * share;
    }
    n = total;
  }

  // Parts lie in memory column by column, so that neighbours are read together.
  __device__ void store(double* columns, int64_t parts, int64_t i) const {
#pragma unroll
    for (int k = 0; k < kSums; ++k) columns[k * parts + i] = sums[k];
    columns += kSums * parts + i;
    columns[0] = n;
    columns[parts] = moments[0].mean;
    columns[2 * parts] = moments[0].m2;
    columns[3 * parts] = moments[1].mean;
    columns[4 * parts] = moments[1].m2;
  }
};

// m2 of the whole from what a part adds to it; a part without elements adds nothing.
__device__ inline double m2_about(double mean, double part_n, const Moments& part) {
  const double difference = part.mean - mean;
  return part_n > 0 ? part.m2 + part_n * difference * difference : 0.0;
}

__device__ inline double weighted(double n, double mean) { return n > 0 ? n * mean : 0.0; }

// The parts of the 32 lanes made one, in every lane.
template <int kSums>
__device__ Part<kSums> combine_lanes(const Part<kSums>& part) {
  Part<kSums> whole;
#pragma unroll
  for (int k = 0; k < kSums; ++k) whole.sums[k] = warp_sum(part.sums[k]);
  whole.n = warp_sum(part.n);
  const double inverse = whole.n > 0 ? 1.0 / whole.n : 0.0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Moments& moments = part.moments[k];
    whole.moments[k].mean = warp_sum(weighted(part.n, moments.mean)) * inverse;
    whole.moments[k].m2 = warp_sum(m2_about(whole.moments[k].mean, part.n, moments));
  }
  return whole;
}

// The parts that the warps left in `of_warps`, made one; for warp 0, after a barrier.
template <int kSums>
__device__ Part<kSums> combine_warps(const Part<kSums>* of_warps) {
  const int warps = blockDim.x / kWarp;
  return combine_lanes(threadIdx.x < warps ? of_warps[threadIdx.x] : Part<kSums>::empty());
}

// All parts in memory made one by one block; valid in its warp 0. of_warps has room for a part of
// every warp.
template <int kSums>
__device__ Part<kSums> combine_columns(const double* columns, int64_t parts,
                                       Part<kSums>* of_warps) {
  Part<kSums> own = Part<kSums>::empty();
  const double* n = columns + kSums * parts;
  for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) own.sums[k] += columns[k * parts + i];
    own.n += n[i];
#pragma unroll
    for (int k = 0; k < 2; ++k) own.moments[k].mean += weighted(n[i], n[(1 + 2 * k) * parts + i]);
  }
  const double inverse = own.n > 0 ? 1.0 / own.n : 0.0;
#pragma unroll
  for (int k = 0; k < 2; ++k) own.moments[k].mean *= inverse;
  for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Moments part{n[(1 + 2 * k) * parts + i], n[(2 + 2 * k) * parts + i]};
      own.moments[k].m2 += m2_about(own.moments[k].mean, n[i], part);
    }
  }
  own = combine_lanes(own);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = own;
  __syncthreads();
  return combine_warps(of_warps);
}

// 1 - residual / total; 0 where there is no variance to explain, but for the rounding of the mean.
__host__ __device__ inline float explained_variance(double residual, double total, double mean) {
  const double rounding = 1e-6 * mean;
  return total <= rounding * rounding ? 0.0f : static_cast<float>(1.0 - residual / total);
}

}  // namespace fastrl::cuda
