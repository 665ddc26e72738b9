// KL penalty, reward, GAE, returns, statistics and whitening. A block of rows goes through all
// steps while it is in the cache; whitening is a second pass because it needs every block's
// moments.

#include <cmath>
#include <vector>

#include "../ops.h"
#include "gae_block.h"
#include "kl.h"
#include "moments.h"

namespace fastrl::cpu::FASTRL_ISA {

namespace {

// Sums over kept tokens (or over rows that keep one), in float64.
struct Sums {
  double rows = 0.0, kl = 0.0, reward = 0.0, score = 0.0, value = 0.0;
  Moments advantages, returns;

  void add(const Sums& other) {
    rows += other.rows;
    kl += other.kl;
    reward += other.reward;
    score += other.score;
    value += other.value;
    advantages.add(other.advantages);
    returns.add(other.returns);
  }
};

struct Shaping {
  float kl_coef;
  float kl_clip;     // infinity for none
  float score_clip;  // infinity for none
};

int64_t last_kept(const bool* mask, int64_t steps) {
  for (uint64_t eight = 0; steps >= 8; steps -= 8) {
    std::memcpy(&eight, mask + steps - 8, 8);
    if (eight != 0) break;
  }
  while (steps > 0 && !mask[steps - 1]) --steps;
  return steps - 1;
}

float clamp_score(float score, float limit) {
  return score > limit ? limit : score < -limit ? -limit : score;  // NaN stays NaN
}

// kl and rewards of one row; its sums but those of advantages and returns, which come later.
template <int kEstimator>
Sums shape_row(const float* logprobs, const float* ref_logprobs, const float* values, float score,
               const bool* mask, int64_t steps, Shaping shaping, float* rewards, float* kl) {
  const int64_t last = last_kept(mask, steps);
  const vfloat limit = broadcast(shaping.kl_clip);
  vfloat kl_sum = broadcast(0.0f), reward_sum = kl_sum, value_sum = kl_sum;
  for_each_vector(steps, [&](int64_t t, auto lanes) {
    const vint keep = load_flags(mask + t, lanes);
    const vfloat k1 = load_first(logprobs + t, lanes) - load_first(ref_logprobs + t, lanes);
    const vfloat estimate = select(keep, kl_estimate<kEstimator>(k1));
    const vfloat clipped = clamp(estimate, -limit, limit);
    const vfloat reward = select(keep, -shaping.kl_coef * clipped);
    store_first(kl + t, lanes, clipped);
    store_first(rewards + t, lanes, reward);
    kl_sum += estimate;
    reward_sum += reward;
    value_sum += select(keep, load_first(values + t, lanes));
  });
  Sums sums;
  if (last < 0) return sums;
  const float clipped_score = clamp_score(score, shaping.score_clip);
  rewards[last] += clipped_score;
  sums.rows = 1.0;
  sums.kl = reduce_add_double(kl_sum);
  sums.reward = reduce_add_double(reward_sum) + clipped_score;
  sums.value = reduce_add_double(value_sum);
  sums.score = score;
  return sums;
}

// In the order of AdvantageStats (fastrl/ops/ppo_advantages.py).
void write_stats(const Sums& sums, float* stats) {
  const double n = std::max(sums.advantages.n, 1.0), rows = std::max(sums.rows, 1.0);
  const double values[] = {
      sums.advantages.n,
      sums.rows,
      sums.kl / n,
      sums.kl / rows,
      sums.reward / rows,
      sums.score / rows,
      sums.value / n,
      sums.returns.mean,
      sums.returns.variance(),
      sums.advantages.mean,
      std::sqrt(sums.advantages.variance()),
      explained_variance(sums.advantages.variance(), sums.returns.variance(), sums.returns.mean),
  };
  std::copy(std::begin(values), std::end(values), stats);
}

constexpr double kWhitenEps = 1e-8;
constexpr int64_t kChunk = 4096;

void whiten(const Moments& moments, const bool* mask, int64_t size, bool center, bool scale,
            float* advantages, int threads) {
  const float shift = center ? static_cast<float>(moments.mean) : 0.0f;
  const float factor =
      scale ? static_cast<float>(1.0 / std::sqrt(moments.variance() + kWhitenEps)) : 1.0f;
  const int64_t chunks = (size + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(team(size, threads)) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* x = advantages + chunk * kChunk;
    const bool* x_mask = mask + chunk * kChunk;
    for_each_vector(std::min(kChunk, size - chunk * kChunk), [&](int64_t i, auto lanes) {
      const vint keep = load_flags(x_mask + i, lanes);
      store_first(x + i, lanes, select(keep, (load_first(x + i, lanes) - shift) * factor));
    });
  }
}

}  // namespace

void ppo_advantages(int64_t rows, int64_t steps, const float* logprobs, const float* ref_logprobs,
                    const float* values, const float* scores, const bool* mask, float kl_coef,
                    int kl_estimator, float kl_clip, float score_clip, float gamma,
                    float gae_lambda, bool center, bool scale, float* advantages, float* returns,
                    float* rewards, float* kl, double* moments, float* stats, int threads) {
  const auto shape = kl_estimator == 1   ? shape_row<1>
                     : kl_estimator == 2 ? shape_row<2>
                                         : shape_row<3>;
  const Shaping shaping{kl_coef, kl_clip, score_clip};
  const GaeInputs inputs{rewards, values, mask,       nullptr, nullptr,
                         nullptr, gamma,  gae_lambda, rows,    steps};
  const int64_t blocks = (rows + kLanes - 1) / kLanes;
  std::vector<Sums> parts(rows);
#pragma omp parallel for num_threads(team(rows* steps, threads)) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kLanes, end = std::min(first + kLanes, rows);
    for (int64_t b = first; b < end; ++b) {
      const int64_t at = b * steps;
      parts[b] = shape(logprobs + at, ref_logprobs + at, values + at, scores[b], mask + at, steps,
                       shaping, rewards + at, kl + at);
    }
    gae_block(inputs, first, advantages, returns);
    for (int64_t b = first; b < end; ++b) {
      const auto row_moments =
          moments_of<2>(mask + b * steps, steps, [&](int64_t t, auto lanes, vfloat(&v)[2]) {
            v[0] = load_first(advantages + b * steps + t, lanes);
            v[1] = load_first(returns + b * steps + t, lanes);
          });
      parts[b].advantages = row_moments[0];
      parts[b].returns = row_moments[1];
    }
  }
  Sums total;
  for (const Sums& part : parts) total.add(part);
  moments[0] = total.advantages.n;
  moments[1] = total.advantages.mean;
  moments[2] = total.advantages.m2;
  write_stats(total, stats);
  if (center || scale) {
    whiten(total.advantages, mask, rows * steps, center, scale, advantages, threads);
  }
}

}  // namespace fastrl::cpu::FASTRL_ISA
