// One row of softmax(logits): statistics in one pass, and the gradient of log-prob and entropy.
// Shared by token_logprobs and the linear heads, which run it on chunks of logits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace fastrl::cpu::FASTRL_ISA {

// x = softcap * tanh(logit / softcap) if softcap > 0, else the logit; -inf stays -inf either way,
// so that banned tokens stay banned.
struct LogitMap {
  float inv_temperature;
  float softcap;

  template <bool kSoftcap>
  vfloat capped(vfloat logit) const {
    if constexpr (!kSoftcap) return logit;
    vfloat e = exp(logit * (2.0f / softcap));  // tanh(y) = 1 - 2 / (e^2y + 1)
    vfloat x = softcap - 2.0f * softcap / (e + 1.0f);
    return logit == broadcast(-kInf) ? logit : x;
  }
};

// Over d_v = (x_v - max) / temperature: log_sum = log sum_v e^d_v and mean = sum_v p_v d_v. The
// maximum is kept apart from the log-sum so that a large common offset of the logits costs no
// precision.
struct RowStats {
  float max;
  float log_sum;
  float mean;
  float entropy() const { return max == -kInf ? 0.0f : log_sum - mean; }
};

// Elements per block: the block's second reading (exponentials, after the maximum is known) hits
// the L1 cache.
constexpr int64_t kSoftmaxBlock = 2048;

// exp2's argument underflows below this anyway; the bound keeps (-inf) * 0 out of the weighted sum.
constexpr float kLowestLog2 = -150.0f;

template <bool kSoftcap, bool kMean, typename T>
RowStats softmax_row_stats(const T* logits, int64_t vocab, LogitMap map) {
  const float scale = map.inv_temperature * kLog2e;
  constexpr int kUnroll = 4;
  float max = -kInf, sum = 0.0f, weighted = 0.0f;
  bool has_nan = false;
  for (int64_t begin = 0; begin < vocab; begin += kSoftmaxBlock) {
    const T* x = logits + begin;
    const int64_t count = std::min(kSoftmaxBlock, vocab - begin);
    vfloat block_max[kUnroll];
    for (auto& m : block_max) m = broadcast(-kInf);
    int64_t i = 0;
    for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) {
        block_max[u] = vmax(load(x + i + u * kLanes), block_max[u]);
      }
    }
    for (; i + kLanes <= count; i += kLanes) block_max[0] = vmax(load(x + i), block_max[0]);
    if (i < count) block_max[1] = vmax(load_partial(x + i, count - i, -kInf), block_max[1]);
    vfloat m4 = vmax(vmax(block_max[0], block_max[1]), vmax(block_max[2], block_max[3]));
    float raw_max = reduce_max(m4);
    float x_max = map.capped<kSoftcap>(broadcast(raw_max))[0];
    if (x_max > max) {
      // e^(old - new) is 0 for the first block, whose sums are 0 as well.
      float shift = max == -kInf ? 0.0f : (max - x_max) * scale;
      float rescale = exp2(broadcast(shift))[0];
      if constexpr (kMean) weighted = (weighted + shift * sum) * rescale;
      sum *= rescale;
      max = x_max;
    }
    const float reference = max == -kInf ? 0.0f : max;  // a block of -inf adds exp(-inf) = 0
    vfloat block_sum[kUnroll], block_weighted[kUnroll];
    for (int u = 0; u < kUnroll; ++u) block_sum[u] = block_weighted[u] = broadcast(0.0f);
    auto add = [&](vfloat logit, int u) {
      vfloat d = (map.capped<kSoftcap>(logit) - reference) * scale;
      vfloat e = exp2(d);
      block_sum[u] += e;
      if constexpr (kMean) block_weighted[u] += e * vmax(broadcast(kLowestLog2), d);
    };
    for (i = 0; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) add(load(x + i + u * kLanes), u);
    }
    for (; i + kLanes <= count; i += kLanes) add(load(x + i), 0);
    if (i < count) add(load_partial(x + i, count - i, -kInf), 1);
    sum += reduce_add((block_sum[0] + block_sum[1]) + (block_sum[2] + block_sum[3]));
    if constexpr (kMean) {
      weighted += reduce_add((block_weighted[0] + block_weighted[1]) +
                             (block_weighted[2] + block_weighted[3]));
    }
    has_nan |= sum != sum;
  }
  constexpr float kLn2 = 0.693147180559945309417f;
  if (has_nan) return {max, NAN, NAN};
  if (max == -kInf) return {max, 0.0f, 0.0f};
  return {max, std::log(sum), kMean ? weighted / sum * kLn2 : 0.0f};
}

// log p of one token; never above 0. A row without any finite logit gives -inf.
template <bool kSoftcap, typename T>
float softmax_row_logprob(const T* logits, int64_t token_id, const RowStats& stats, LogitMap map) {
  float x = map.capped<kSoftcap>(broadcast(to_float(logits[token_id])))[0];
  if (stats.max == -kInf && x == -kInf) return -kInf;
  float logprob = (x - stats.max) * map.inv_temperature - stats.log_sum;
  return logprob > 0.0f ? 0.0f : logprob;
}

// Gradients that reach a row from above.
struct RowUpstream {
  float dlogprob;
  float dentropy;
};

// d(dlogprob * log p_t + dentropy * H) / d logit_v
//   = (dlogprob * ([v = t] - p_v) - dentropy * p_v * (log p_v + H)) / temperature * (1 - (x_v /
//   softcap)^2)
// `out` may be `logits` itself.
template <bool kSoftcap, bool kEntropy, typename T, typename Out>
void softmax_row_gradient(const T* logits, int64_t vocab, int64_t token_id, const RowStats& stats,
                          float logprob, RowUpstream up, LogitMap map, Out* out) {
  if (stats.max == -kInf) {  // no distribution, no gradient
    std::memset(out, 0, vocab * sizeof(Out));
    return;
  }
  const float scale = map.inv_temperature * kLog2e;
  const float offset = stats.log_sum * kLog2e;
  const float entropy = stats.entropy();
  constexpr float kLn2 = 0.693147180559945309417f;
  auto gradient = [&](vfloat logit) {
    vfloat x = map.capped<kSoftcap>(logit);
    vfloat log2p = (x - stats.max) * scale - offset;
    vfloat p = exp2(log2p);
    vfloat d = p * -up.dlogprob;
    if constexpr (kEntropy) {
      vfloat logp = vmax(broadcast(kLowestLog2), log2p) * kLn2;
      d -= up.dentropy * p * (logp + entropy);
    }
    d *= map.inv_temperature;
    if constexpr (kSoftcap) {
      vfloat t = x * (1.0f / map.softcap);
      vfloat slope = 1.0f - t * t;
      d *= logit == broadcast(-kInf) ? broadcast(0.0f) : slope;
    }
    return d;
  };
  // The target's entry uses 1 - p = -expm1(log p): exact where p rounds to 1. Computed before `out`
  // overwrites it.
  float target = to_float(logits[token_id]);
  float target_x = map.capped<kSoftcap>(broadcast(target))[0];
  float d = -up.dlogprob * std::expm1(logprob);
  if constexpr (kEntropy) {
    float p = std::exp(logprob);
    if (p > 0.0f) d -= up.dentropy * p * (logprob + entropy);
  }
  d *= map.inv_temperature;
  if constexpr (kSoftcap) {
    float t = target_x / map.softcap;
    d *= target == -kInf ? 0.0f : 1.0f - t * t;
  }
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) store(out + i, gradient(load(logits + i)));
  if (i < vocab) {
    store_partial(out + i, vocab - i, gradient(load_partial(logits + i, vocab - i, -kInf)));
  }
  store_scalar(out + token_id, d);
}

// Turns run-time flags into template arguments: body(std::true_type{}, std::false_type{}).
template <typename Body>
void dispatch_flags(bool first, bool second, Body&& body) {
  auto with_second = [&](auto a) {
    second ? body(a, std::true_type{}) : body(a, std::false_type{});
  };
  first ? with_second(std::true_type{}) : with_second(std::false_type{});
}

}  // namespace fastrl::cpu::FASTRL_ISA
