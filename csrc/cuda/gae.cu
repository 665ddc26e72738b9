// Generalised advantage estimation. How a row is split depends on its length alone, so its bits do
// not depend on the batch.
#include "gae_scan.cuh"
#include "ops.h"

namespace fastrl::cuda {
namespace {

struct Inputs {
  const float* rewards;
  const float* values;
  const bool* mask;              // may be null
  const bool* dones;             // may be null
  const float* lambdas;          // one per row instead of gae_lambda; may be null
  const float* bootstrap_value;  // may be null
  float gamma, gae_lambda;
  int64_t rows, steps;
};

__device__ inline Discount discount_of(const Inputs& x, int64_t row) {
  return {x.gamma, x.gamma * (x.lambdas == nullptr ? x.gae_lambda : x.lambdas[row])};
}

// What enters a row on its right.
__device__ inline float first_carry(const Inputs& x, int64_t row) {
  return x.bootstrap_value == nullptr ? 0.0f : x.gamma * x.bootstrap_value[row];
}

__device__ inline Steps load_steps(const Inputs& x, const Span& span) {
  Steps steps;
  load(x.rewards, span, steps.reward);
  load(x.values, span, steps.value);
  const uint32_t kept = load_flags(x.mask, span);
  const uint32_t done = x.dones == nullptr ? 0u : load_flags(x.dones, span);
  steps.kept = bits_of(kept);
  steps.done = bits_of(done);
  return steps;
}

__device__ inline void finish(const Steps& steps, Discount discount, float carry, const Span& span,
                              float* advantages, float* returns) {
  float advantage[kItems], value[kItems];
  walk(steps, discount, carry, advantage);
  store(advantages, span, advantage);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    value[i] = has(steps.kept, i) ? advantage[i] + steps.value[i] : 0.0f;
  }
  store(returns, span, value);
}

__global__ void __launch_bounds__(kShortThreads)
    gae_short_rows_kernel(Inputs x, int lanes, float* advantages, float* returns) {
  __shared__ float tiles[kShortThreads / kWarp][kSpan];
  const ShortRow at = short_row(x.rows, x.steps, lanes, tiles[threadIdx.x / kWarp]);
  const Discount discount = at.exists ? discount_of(x, at.row) : Discount{};
  const float carry = at.exists ? first_carry(x, at.row) : 0.0f;
  const Steps steps = load_steps(x, at.span);
  const Affine suffix = suffix_scan(map_of(steps, discount), lanes);
  finish(steps, discount, entering(suffix, lanes, carry), at.span, advantages, returns);
}

__global__ void __launch_bounds__(kLongThreads)
    gae_long_rows_kernel(Inputs x, float* advantages, float* returns) {
  __shared__ float tiles[kMaxWarps][kSpan];
  __shared__ ChunkTotals totals[2];
  const int warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x, begin = row * x.steps, chunk = blockDim.x * int64_t{kItems};
  const Discount discount = discount_of(x, row);
  Entry state{first_carry(x, row), false};
  for (int64_t c = ceil_div(x.steps, chunk) - 1; c >= 0; --c) {
    const int64_t first = begin + c * chunk + warp * kSpan;
    const Span span = span_between(first, begin + x.steps, tiles[warp]);
    const Steps steps = load_steps(x, span);
    const Affine map = map_of(steps, discount);
    const Entry entry = chunk_scan(map, steps.kept, totals[c % 2], state);
    finish(steps, discount, entry.carry, span, advantages, returns);
  }
}

}  // namespace

void gae(int64_t rows, int64_t steps, const float* rewards, const float* values, const bool* mask,
         const bool* dones, const float* lambdas, const float* bootstrap_value, float gamma,
         float gae_lambda, float* advantages, float* returns, void* stream) {
  if (rows == 0 || steps == 0) return;
  const Inputs x{rewards,         values, mask,       dones, lambdas,
                 bootstrap_value, gamma,  gae_lambda, rows,  steps};
  if (steps <= kSpan) {
    const int lanes = lanes_of_short_row(steps);
    const auto grid = static_cast<unsigned>(blocks_of_short_rows(rows, lanes));
    FASTRL_LAUNCH(gae_short_rows_kernel, grid, kShortThreads, 0, stream, x, lanes, advantages,
                  returns);
  } else {
    FASTRL_LAUNCH(gae_long_rows_kernel, static_cast<unsigned>(rows), threads_of_long_row(steps), 0,
                  stream, x, advantages, returns);
  }
  check_launch("gae");
}

}  // namespace fastrl::cuda
