// KL penalty, reward, GAE and returns in one pass, which leaves a part of the statistics for every
// row; one block makes them one; whitening is a second pass, because it needs them. The parts are
// of rows, so no bit depends on the GPU.
#include "gae_scan.cuh"
#include "kl.cuh"
#include "moments.cuh"
#include "ops.h"

namespace fastrl::cuda {
namespace {

constexpr double kWhitenEps = 1e-8;
constexpr int kTotalThreads = 512;
constexpr int kWhitenThreads = 256;

// Sums over kept tokens, or over rows that keep one; moments are of advantages and of returns.
enum Sum { kRows, kKl, kReward, kScore, kValue, kSums };
using RowPart = Part<kSums>;

struct Inputs {
  const float* logprobs;
  const float* ref_logprobs;
  const float* values;
  const float* scores;
  const bool* mask;
  int64_t rows, steps;
  float kl_coef;
  int kl_estimator;
  float kl_clip, score_clip;  // infinity for none
  Discount discount;
};

struct Outputs {
  float* advantages;
  float* returns;
  float* rewards;
  float* kl;
  double* parts;
};

// What the lanes of a group hold of one row.
struct Shaped {
  Steps steps;    // rewards without the score
  float kl_sum;   // of the lane, before kl_clip
  float score;    // clipped; it enters the scan on the right, as the last kept token's reward
  bool has_last;  // the row's last kept token is the lane's
};

__device__ inline Shaped shape(const Inputs& x, const Outputs& out, float score, const Span& span) {
  Shaped shaped;
  Steps& steps = shaped.steps;
  float logprob[kItems], ref_logprob[kItems], kl[kItems];
  load(x.logprobs, span, logprob);
  load(x.ref_logprobs, span, ref_logprob);
  load(x.values, span, steps.value);
  const uint32_t kept = load_flags(x.mask, span);
  steps.kept = bits_of(kept);
  steps.done = 0;
  shaped.kl_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    kl[i] = steps.reward[i] = 0.0f;
    if (!has(steps.kept, i)) continue;
    const float estimate = kl_estimate(logprob[i] - ref_logprob[i], x.kl_estimator);
    shaped.kl_sum += estimate;
    kl[i] = clamp(estimate, -x.kl_clip, x.kl_clip);
    steps.reward[i] = -x.kl_coef * kl[i];
  }
  store(out.kl, span, kl);
  shaped.score = clamp(score, -x.score_clip, x.score_clip);
  return shaped;
}

// Writes advantages, returns and rewards, where `carry` enters the lane; the group's statistics but
// those of the row as a whole.
__device__ inline RowPart finish(const Outputs& out, const Shaped& shaped, Discount discount,
                                 float carry, int lanes, const Span& span) {
  const Steps& steps = shaped.steps;
  float advantage[kItems], value[kItems], reward[kItems];
  float reward_sum = 0.0f, value_sum = 0.0f;
  walk(steps, discount, carry, advantage);
  store(out.advantages, span, advantage);
  const int last = shaped.has_last ? 31 - __clz(static_cast<int>(steps.kept)) : kItems;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool kept = has(steps.kept, i);
    reward_sum += steps.reward[i];
    value_sum += kept ? steps.value[i] : 0.0f;
    value[i] = kept ? advantage[i] + steps.value[i] : 0.0f;
    reward[i] = i == last ? steps.reward[i] + shaped.score : steps.reward[i];
  }
  store(out.returns, span, value);
  store(out.rewards, span, reward);
  const float n = lanes_sum(static_cast<float>(__popc(steps.kept)), lanes);
  RowPart part = RowPart::empty();
  part.n = n;
  part.sums[kKl] = lanes_sum(shaped.kl_sum, lanes);
  part.sums[kReward] = lanes_sum(reward_sum, lanes);
  part.sums[kValue] = lanes_sum(value_sum, lanes);
  part.moments[0] = lanes_moments<kItems>(advantage, steps.kept, n, lanes);
  part.moments[1] = lanes_moments<kItems>(value, steps.kept, n, lanes);
  return part;
}

// Adds what a row contributes as a whole, and leaves its part in memory.
__device__ inline void store_row(const Inputs& x, RowPart part, int64_t row, double* parts) {
  if (part.n > 0) {
    part.sums[kRows] = 1.0;
    part.sums[kScore] = x.scores[row];
    part.sums[kReward] += clamp(x.scores[row], -x.score_clip, x.score_clip);
  }
  part.store(parts, x.rows, row);
}

__global__ void __launch_bounds__(kShortThreads)
    ppo_advantages_short_rows_kernel(Inputs x, int lanes, Outputs out) {
  __shared__ float tiles[kShortThreads / kWarp][kSpan];
  const ShortRow at = short_row(x.rows, x.steps, lanes, tiles[threadIdx.x / kWarp]);
  Shaped shaped = shape(x, out, at.exists ? x.scores[at.row] : 0.0f, at.span);
  const unsigned lane = threadIdx.x % kWarp, lane_of_row = lane & (lanes - 1);
  const unsigned kept_right = __ballot_sync(kFullMask, shaped.steps.kept != 0) >> lane >> 1;
  const unsigned of_row = (1u << (lanes - 1 - lane_of_row)) - 1;
  shaped.has_last = shaped.steps.kept != 0 && (kept_right & of_row) == 0;
  const Affine suffix = suffix_scan(map_of(shaped.steps, x.discount), lanes);
  const float carry = entering(suffix, lanes, shaped.score);
  const RowPart part = finish(out, shaped, x.discount, carry, lanes, at.span);
  if (at.exists && lane_of_row == 0) store_row(x, part, at.row, out.parts);
}

__global__ void __launch_bounds__(kLongThreads, 2)
    ppo_advantages_long_rows_kernel(Inputs x, Outputs out) {
  __shared__ float tiles[kMaxWarps][kSpan];
  __shared__ ChunkTotals totals[2];
  __shared__ RowPart of_warps[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x, begin = row * x.steps, chunk = blockDim.x * int64_t{kItems};
  if (lane == 0) of_warps[warp] = RowPart::empty();
  Entry state{clamp(x.scores[row], -x.score_clip, x.score_clip), false};
  for (int64_t c = ceil_div(x.steps, chunk) - 1; c >= 0; --c) {
    const int64_t first = begin + c * chunk + warp * kSpan;
    const Span span = span_between(first, begin + x.steps, tiles[warp]);
    Shaped shaped = shape(x, out, x.scores[row], span);
    const Affine map = map_of(shaped.steps, x.discount);
    const Entry entry = chunk_scan(map, shaped.steps.kept, totals[c % 2], state);
    shaped.has_last = shaped.steps.kept != 0 && !entry.kept_right;
    const RowPart part = finish(out, shaped, x.discount, entry.carry, kWarp, span);
    if (lane == 0) of_warps[warp].add(part);
  }
  __syncthreads();
  if (warp > 0) return;
  const RowPart part = combine_warps(of_warps);
  if (lane == 0) store_row(x, part, row, out.parts);
}

// In the order of AdvantageStats (fastrl/ops/ppo_advantages.py).
__device__ void write_stats(const RowPart& total, float* stats) {
  const double n = total.n > 1 ? total.n : 1.0;
  const double rows = total.sums[kRows] > 1 ? total.sums[kRows] : 1.0;
  const double advantage_variance = variance(total.moments[0], total.n);
  const double return_variance = variance(total.moments[1], total.n);
  stats[0] = static_cast<float>(total.n);
  stats[1] = static_cast<float>(total.sums[kRows]);
  stats[2] = static_cast<float>(total.sums[kKl] / n);
  stats[3] = static_cast<float>(total.sums[kKl] / rows);
  stats[4] = static_cast<float>(total.sums[kReward] / rows);
  stats[5] = static_cast<float>(total.sums[kScore] / rows);
  stats[6] = static_cast<float>(total.sums[kValue] / n);
  stats[7] = static_cast<float>(total.moments[1].mean);
  stats[8] = static_cast<float>(return_variance);
  stats[9] = static_cast<float>(total.moments[0].mean);
  stats[10] = static_cast<float>(sqrt(advantage_variance));
  stats[11] = explained_variance(advantage_variance, return_variance, total.moments[1].mean);
}

// One block: the parts of all rows become statistics, and the shift and factor of whitening.
__global__ void __launch_bounds__(kTotalThreads)
    ppo_advantages_total_kernel(const double* parts, int64_t rows, bool center, bool scale,
                                double* moments, float* stats, float* whitening) {
  __shared__ RowPart of_warps[kTotalThreads / kWarp];
  const RowPart total = combine_columns(parts, rows, of_warps);
  if (threadIdx.x > 0) return;
  write_stats(total, stats);
  moments[0] = total.n;
  moments[1] = total.moments[0].mean;
  moments[2] = total.moments[0].m2;
  const double deviation = sqrt(variance(total.moments[0], total.n) + kWhitenEps);
  whitening[0] = center ? static_cast<float>(total.moments[0].mean) : 0.0f;
  whitening[1] = scale ? static_cast<float>(1.0 / deviation) : 1.0f;
}

__global__ void __launch_bounds__(kWhitenThreads)
    ppo_advantages_whiten_kernel(const bool* mask, int64_t size, const float* whitening,
                                 float* advantages) {
  __shared__ float tiles[kWhitenThreads / kWarp][kSpan];
  const int warp = threadIdx.x / kWarp;
  const int64_t first = blockIdx.x * int64_t{kWhitenThreads * kItems} + warp * kSpan;
  const Span span = span_between(first, size, tiles[warp]);
  const uint32_t flags = load_flags(mask, span);
  const float shift = whitening[0], factor = whitening[1];
  float x[kItems];
  load(advantages, span, x);
  const unsigned kept = bits_of(flags);
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = has(kept, i) ? (x[i] - shift) * factor : 0.0f;
  store(advantages, span, x);
}

}  // namespace

int64_t ppo_advantages_workspace(int64_t rows) { return rows * RowPart::kColumns + 1; }

void ppo_advantages(int64_t rows, int64_t steps, const float* logprobs, const float* ref_logprobs,
                    const float* values, const float* scores, const bool* mask, float kl_coef,
                    int kl_estimator, float kl_clip, float score_clip, float gamma,
                    float gae_lambda, bool center, bool scale, float* advantages, float* returns,
                    float* rewards, float* kl, double* moments, float* stats, double* workspace,
                    void* stream) {
  const Inputs x{logprobs,     ref_logprobs, values,     scores,
                 mask,         rows,         steps,      kl_coef,
                 kl_estimator, kl_clip,      score_clip, {gamma, gamma * gae_lambda}};
  const Outputs out{advantages, returns, rewards, kl, workspace};
  float* whitening = reinterpret_cast<float*>(workspace + rows * RowPart::kColumns);
  if (rows > 0 && steps <= kSpan) {
    const int lanes = lanes_of_short_row(steps);
    const auto grid = static_cast<unsigned>(blocks_of_short_rows(rows, lanes));
    FASTRL_LAUNCH(ppo_advantages_short_rows_kernel, grid, kShortThreads, 0, stream, x, lanes, out);
  } else if (rows > 0) {
    FASTRL_LAUNCH(ppo_advantages_long_rows_kernel, static_cast<unsigned>(rows),
                  threads_of_long_row(steps), 0, stream, x, out);
  }
  FASTRL_LAUNCH(ppo_advantages_total_kernel, 1, kTotalThreads, 0, stream, workspace, rows, center,
                scale, moments, stats, whitening);
  const int64_t size = rows * steps;
  if ((center || scale) && size > 0) {
    const auto grid = static_cast<unsigned>(ceil_div<int64_t>(size, kWhitenThreads * kItems));
    FASTRL_LAUNCH(ppo_advantages_whiten_kernel, grid, kWhitenThreads, 0, stream, mask, size,
                  whitening, advantages);
  }
  check_launch("ppo_advantages");
}

}  // namespace fastrl::cuda
