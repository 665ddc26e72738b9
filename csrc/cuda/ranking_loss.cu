// Bradley-Terry loss over the ordered pairs of every group. There are thousands of answers at most,
// so a warp compares an answer with all others, in place of a sort: first its pairs, then how many
// pairs its group has, then totals. A small batch does the three steps in one block.
#include "moments.cuh"
#include "ops.h"

namespace fastrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlockThreads = 512;
constexpr int kBlockAnswers = 256;  // as many in one block

struct Inputs {
  const float* scores;
  const int64_t* group_ids;
  const double* ranks;
  const float* margins;  // may be null
  int64_t size;
  float center_coef;
};

// Columns of what every answer contributes: as the better one of its pairs, and whether it stands
// for its group.
enum Column { kLoss, kRight, kDifference, kPairs, kGroups, kColumns };

struct Outputs {
  double* columns;
  float* dscores;
  float* loss;
  float* stats;
};

struct Pair {
  float loss, p_wrong;  // -log sigmoid(x) and sigmoid(-x)
};

__host__ __device__ inline Pair pair_of(float x) {
  const float e = expf(-fabsf(x));
  const bool negative = x < 0.0f;
  return {log1pf(e) + (negative ? -x : 0.0f), (negative ? 1.0f : e) / (1.0f + e)};
}

// The pairs of answer i: its contributions as the better one, its gradient as either. By a warp.
__device__ void compare(const Inputs& x, const Outputs& out, int64_t i) {
  const int lane = threadIdx.x % kWarp;
  const int64_t group = x.group_ids[i];
  const double rank = x.ranks[i];
  const float score = x.scores[i];
  float loss = 0.0f, gradient = 0.0f, right = 0.0f, difference = 0.0f;
  int pairs = 0;
  for (int64_t j = lane; j < x.size; j += kWarp) {
    if (x.group_ids[j] != group) continue;
    const bool better = rank < x.ranks[j];
    if (!better && !(rank > x.ranks[j])) continue;
    const int64_t winner = better ? i : j;
    const float margin = x.margins == nullptr ? 0.0f : x.margins[winner];
    const float d = better ? score - x.scores[j] : x.scores[j] - score;
    const float total = score + x.scores[j];
    const Pair pair = pair_of(d - margin);
    gradient += better ? -pair.p_wrong : pair.p_wrong;
    if (x.center_coef > 0.0f) gradient += 2.0f * x.center_coef * total;
    if (!better) continue;
    loss += pair.loss;
    if (x.center_coef > 0.0f) loss += x.center_coef * total * total;
    right += d > 0.0f ? 1.0f : d == 0.0f ? 0.5f : 0.0f;
    difference += d;
    ++pairs;
  }
  loss = lanes_sum(loss, kWarp);
  gradient = lanes_sum(gradient, kWarp);
  right = lanes_sum(right, kWarp);
  difference = lanes_sum(difference, kWarp);
  pairs = warp_reduce(pairs, [](int a, int b) { return a + b; });
  if (lane > 0) return;
  // An answer whose rank is NaN has no place among the others: let it be seen.
  const float seen = rank == rank ? 0.0f : nanf("");
  out.columns[kLoss * x.size + i] = loss + seen;
  out.columns[kRight * x.size + i] = right;
  out.columns[kDifference * x.size + i] = difference;
  out.columns[kPairs * x.size + i] = pairs;
  out.dscores[i] = gradient + seen;
}

// Loss and gradient of answer i over the number of pairs of its group. By a warp.
__device__ void weigh(const Inputs& x, const Outputs& out, int64_t i) {
  const int lane = threadIdx.x % kWarp;
  const int64_t group = x.group_ids[i];
  double pairs = 0.0;
  int before = 0;
  for (int64_t j = lane; j < x.size; j += kWarp) {
    if (x.group_ids[j] != group) continue;
    pairs += out.columns[kPairs * x.size + j];
    before |= j < i ? 1 : 0;
  }
  pairs = warp_sum(pairs);
  before = __any_sync(kFullMask, before);
  if (lane > 0) return;
  const double inverse = 1.0 / (pairs > 1.0 ? pairs : 1.0);
  out.columns[kLoss * x.size + i] *= inverse;
  out.columns[kGroups * x.size + i] = before == 0 && pairs > 0.0 ? 1.0 : 0.0;
  out.dscores[i] = static_cast<float>(out.dscores[i] * inverse);
}

// By a block; the sum of every thread's x, in every thread.
__device__ inline double block_sum(double x, double* scratch) {
  __syncthreads();
  return block_reduce(x, [](double a, double b) { return a + b; }, scratch);
}

// Totals in the order of RankingStats (fastrl/ops/ranking_loss.py), and the mean over groups. By a
// block.
__device__ void finish(const Inputs& x, const Outputs& out) {
  __shared__ double scratch[kBlockThreads / kWarp];
  double totals[kColumns], scores = 0.0, squares = 0.0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < x.size; i += blockDim.x) sum += out.columns[c * x.size + i];
    totals[c] = block_sum(sum, scratch);
  }
  for (int64_t i = threadIdx.x; i < x.size; i += blockDim.x) scores += x.scores[i];
  const double answers = x.size > 0 ? static_cast<double>(x.size) : 1.0;
  const double mean = block_sum(scores, scratch) / answers;
  for (int64_t i = threadIdx.x; i < x.size; i += blockDim.x) {
    squares += (x.scores[i] - mean) * (x.scores[i] - mean);
  }
  squares = block_sum(squares, scratch);
  const double pairs = totals[kPairs] > 1.0 ? totals[kPairs] : 1.0;
  const double scale = 1.0 / (totals[kGroups] > 1.0 ? totals[kGroups] : 1.0);
  for (int64_t i = threadIdx.x; i < x.size; i += blockDim.x) {
    out.dscores[i] = static_cast<float>(out.dscores[i] * scale);
  }
  if (threadIdx.x > 0) return;
  *out.loss = static_cast<float>(totals[kLoss] * scale);
  out.stats[0] = static_cast<float>(totals[kRight] / pairs);
  out.stats[1] = static_cast<float>(totals[kPairs]);
  out.stats[2] = static_cast<float>(totals[kGroups]);
  out.stats[3] = static_cast<float>(totals[kDifference] / pairs);
  out.stats[4] = static_cast<float>(mean);
  out.stats[5] = static_cast<float>(sqrt(squares / answers));
}

__global__ void __launch_bounds__(kThreads) ranking_compare_kernel(Inputs x, Outputs out) {
  const int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (i < x.size) compare(x, out, i);
}

__global__ void __launch_bounds__(kThreads) ranking_weigh_kernel(Inputs x, Outputs out) {
  const int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (i < x.size) weigh(x, out, i);
}

__global__ void __launch_bounds__(kBlockThreads) ranking_finish_kernel(Inputs x, Outputs out) {
  finish(x, out);
}

__global__ void __launch_bounds__(kBlockThreads, 1) ranking_block_kernel(Inputs x, Outputs out) {
  const int warp = threadIdx.x / kWarp, warps = kBlockThreads / kWarp;
  for (int64_t i = warp; i < x.size; i += warps) compare(x, out, i);
  __syncthreads();
  for (int64_t i = warp; i < x.size; i += warps) weigh(x, out, i);
  __syncthreads();
  finish(x, out);
}

}  // namespace

int64_t ranking_loss_workspace(int64_t size) { return size * kColumns; }

void ranking_loss(int64_t size, const float* scores, const int64_t* group_ids, const double* ranks,
                  const float* margins, float center_coef, float* loss, float* stats,
                  float* dscores, double* workspace, void* stream) {
  const Inputs x{scores, group_ids, ranks, margins, size, center_coef};
  const Outputs out{workspace, dscores, loss, stats};
  if (size <= kBlockAnswers) {
    FASTRL_LAUNCH(ranking_block_kernel, 1, kBlockThreads, 0, stream, x, out);
  } else {
    const auto grid = static_cast<unsigned>(ceil_div<int64_t>(size, kWarps));
    FASTRL_LAUNCH(ranking_compare_kernel, grid, kThreads, 0, stream, x, out);
    FASTRL_LAUNCH(ranking_weigh_kernel, grid, kThreads, 0, stream, x, out);
    FASTRL_LAUNCH(ranking_finish_kernel, 1, kBlockThreads, 0, stream, x, out);
  }
  check_launch("ranking_loss");
}

}  // namespace fastrl::cuda
