// Clipped PPO loss of policy and critic: loss, gradients and statistics in one pass over chunks of
// the flattened tokens. Chunks are summed in order, so results do not depend on the thread count.

#include <vector>

#include "../ops.h"
#include "kl.h"
#include "moments.h"

namespace fastrl::cpu::FASTRL_ISA {

namespace {

constexpr int64_t kChunk = 4096;

struct Inputs {
  const float* logprobs;
  const float* values;
  const float* entropy;  // may be null
  const float* old_logprobs;
  const float* old_values;
  const float* advantages;
  const float* returns;
  const bool* mask;
};

struct Options {
  float ratio_low, ratio_high;
  float vf_clip_coef;  // infinity for none
  float vf_coef;
  float ent_coef;
  float dual_clip;  // infinity for none
};

// Gradients of the loss; each may be null.
struct Gradients {
  float* dlogprobs;
  float* dvalues;
  float* dentropy;
};

struct Sums {
  double policy = 0.0, value = 0.0, entropy = 0.0, approx_kl = 0.0, clipped = 0.0,
         value_clipped = 0.0, ratio = 0.0, kl = 0.0;
  float ratio_max = 0.0f;
  Moments returns, residuals;

  void add(const Sums& other) {
    policy += other.policy;
    value += other.value;
    entropy += other.entropy;
    approx_kl += other.approx_kl;
    clipped += other.clipped;
    value_clipped += other.value_clipped;
    ratio += other.ratio;
    kl += other.kl;
    ratio_max = std::max(ratio_max, other.ratio_max);
    returns.add(other.returns);
    residuals.add(other.residuals);
  }
};

// One vector's worth of terms, all 0 on dropped lanes.
struct Terms {
  vfloat policy, value, entropy, approx_kl, clipped, value_clipped, ratio, kl;
};

inline vfloat one_where(vint condition) { return select(condition, broadcast(1.0f)); }

template <typename Lanes>
Terms terms_at(const Inputs& x, const Options& o, const Gradients& g, float scale, int64_t i,
               Lanes lanes) {
  const vint keep = load_flags(x.mask + i, lanes);
  auto kept = [&](const float* p) { return select(keep, load_first(p + i, lanes)); };
  Terms terms;

  const vfloat limit = broadcast(kMaxLogRatio);
  const vfloat log_ratio = kept(x.logprobs) - kept(x.old_logprobs);
  const vfloat bounded = clamp(log_ratio, -limit, limit);
  const vint outside = (log_ratio > limit) | (log_ratio < -limit);
  const vfloat ratio = exp(bounded);
  const vfloat advantage = kept(x.advantages);
  const vfloat unclipped = -advantage * ratio;
  const vfloat clipped = -advantage * clamp(ratio, broadcast(o.ratio_low), broadcast(o.ratio_high));
  const vint is_clipped = clipped > unclipped;
  vfloat policy = is_clipped ? clipped : unclipped;
  const vfloat bound = -o.dual_clip * advantage;
  const vint is_bounded = (advantage < broadcast(0.0f)) & (policy > bound);
  policy = is_bounded ? bound : policy;

  const vfloat value = kept(x.values), old_value = kept(x.old_values), target = kept(x.returns);
  const vfloat error = value - target;
  const vfloat near = clamp(value, old_value - o.vf_clip_coef, old_value + o.vf_clip_coef) - target;
  const vint value_clipped = near * near > error * error;

  terms.policy = policy;
  terms.value = 0.5f * (value_clipped ? near * near : error * error);
  terms.entropy = x.entropy == nullptr ? broadcast(0.0f) : kept(x.entropy);
  terms.approx_kl = select(keep, exp_minus_linear(bounded, ratio));
  terms.clipped = one_where(is_clipped);
  terms.value_clipped = one_where(value_clipped);
  terms.ratio = select(keep, ratio);
  terms.kl = -bounded;  // log_ratio is 0 on dropped lanes
  // d(-A r) / d logprob = -A r; the clipped and bounded branches are constant.
  if (g.dlogprobs != nullptr) {
    const vint constant = is_clipped | is_bounded | outside;
    store_first(g.dlogprobs + i, lanes, (constant ? broadcast(0.0f) : unclipped) * scale);
  }
  if (g.dvalues != nullptr) {
    store_first(g.dvalues + i, lanes,
                (value_clipped ? broadcast(0.0f) : error) * (o.vf_coef * scale));
  }
  if (g.dentropy != nullptr) {
    store_first(g.dentropy + i, lanes, select(keep, broadcast(-o.ent_coef * scale)));
  }
  return terms;
}

Sums chunk_sums(const Inputs& x, const Options& o, const Gradients& g, float scale, int64_t begin,
                int64_t end) {
  CompensatedSum policy, value, entropy;  // they make up the loss
  Terms total{};
  vfloat ratio_max = broadcast(0.0f);
  for_each_vector(end - begin, [&](int64_t i, auto lanes) {
    const Terms terms = terms_at(x, o, g, scale, begin + i, lanes);
    policy.add(terms.policy);
    value.add(terms.value);
    entropy.add(terms.entropy);
    total.approx_kl += terms.approx_kl;
    total.clipped += terms.clipped;
    total.value_clipped += terms.value_clipped;
    total.ratio += terms.ratio;
    total.kl += terms.kl;
    ratio_max = vmax(ratio_max, terms.ratio);
  });
  Sums sums;
  sums.policy = policy.total();
  sums.value = value.total();
  sums.entropy = entropy.total();
  sums.approx_kl = reduce_add_double(total.approx_kl);
  sums.clipped = reduce_add_double(total.clipped);
  sums.value_clipped = reduce_add_double(total.value_clipped);
  sums.ratio = reduce_add_double(total.ratio);
  sums.kl = reduce_add_double(total.kl);
  sums.ratio_max = reduce_max(ratio_max);
  const auto moments =
      moments_of<2>(x.mask + begin, end - begin, [&](int64_t i, auto lanes, vfloat(&v)[2]) {
        v[0] = load_first(x.returns + begin + i, lanes);
        v[1] = v[0] - load_first(x.values + begin + i, lanes);
      });
  sums.returns = moments[0];
  sums.residuals = moments[1];
  return sums;
}

// In the order of PPOStats (fastrl/ops/ppo_loss.py).
void write_stats(const Sums& sums, int64_t tokens, float* stats) {
  const double n = std::max<double>(tokens, 1.0);
  const double values[] = {
      static_cast<double>(tokens),
      sums.policy / n,
      sums.value / n,
      sums.entropy / n,
      sums.approx_kl / n,
      sums.clipped / n,
      sums.value_clipped / n,
      sums.ratio / n,
      sums.ratio == sums.ratio ? sums.ratio_max : sums.ratio,  // NaN stays NaN
      explained_variance(sums.residuals.variance(), sums.returns.variance(), sums.returns.mean),
      sums.kl / n,
  };
  std::copy(std::begin(values), std::end(values), stats);
}

}  // namespace

void ppo_loss(int64_t size, const float* logprobs, const float* values, const float* entropy,
              const float* old_logprobs, const float* old_values, const float* advantages,
              const float* returns, const bool* mask, const float* denominator, double clip_coef,
              float vf_clip_coef, float vf_coef, float ent_coef, float dual_clip, float* loss,
              float* stats, float* dlogprobs, float* dvalues, float* dentropy, int threads) {
  const Inputs x{logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask};
  const Options options{static_cast<float>(1.0 - clip_coef),
                        static_cast<float>(1.0 + clip_coef),
                        vf_clip_coef,
                        vf_coef,
                        ent_coef,
                        dual_clip};
  const Gradients gradients{dlogprobs, dvalues, dentropy};
  const int64_t tokens = count_kept(mask, size);
  const double scale =
      1.0 / (denominator != nullptr ? *denominator : std::max<double>(tokens, 1.0));
  std::vector<Sums> parts((size + kChunk - 1) / kChunk);
#pragma omp parallel for num_threads(team(size, threads)) schedule(static)
  for (int64_t chunk = 0; chunk < static_cast<int64_t>(parts.size()); ++chunk) {
    const int64_t begin = chunk * kChunk;
    parts[chunk] = chunk_sums(x, options, gradients, static_cast<float>(scale), begin,
                              std::min(begin + kChunk, size));
  }
  Sums total;
  for (const Sums& part : parts) total.add(part);
  *loss =
      static_cast<float>((total.policy + vf_coef * total.value - ent_coef * total.entropy) * scale);
  write_stats(total, tokens, stats);
}

}  // namespace fastrl::cpu::FASTRL_ISA
