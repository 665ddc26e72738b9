// One row of softmax(logits): statistics in one pass, and the gradient of log-prob and entropy.
// Shared by token_logprobs and the linear heads, which run it on chunks of logits.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastrl::cpu::FASTRL_ISA {

// x = softcap * tanh(logit / softcap) if softcap > 0, else the logit; -inf stays -inf either way,
// so that banned tokens stay banned.
struct LogitMap {
  float inv_temperature;
  float softcap;

  float scale() const { return inv_temperature * kLog2e; }

  template <bool kSoftcap>
  vfloat capped(vfloat logit) const {
    if constexpr (!kSoftcap) return logit;
    vfloat e = exp(logit * (2.0f / softcap));  // tanh(y) = 1 - 2 / (e^2y + 1)
    vfloat x = softcap - 2.0f * softcap / (e + 1.0f);
    return logit == broadcast(-kInf) ? logit : x;
  }
};

// With d_v = (x_v - offset) * log2(e) / temperature: log_sum = log2 sum_v 2^d_v and mean = sum_v
// p_v d_v. The offset is a logit of the row near its maximum and is kept apart from the log-sum, so
// a large common offset of the logits costs no precision. It is -inf where no logit is above -inf.
struct RowStats {
  float offset;
  float log_sum;
  float mean;
  bool is_dead() const { return offset == -kInf; }
  float entropy() const { return is_dead() ? 0.0f : (log_sum - mean) * kLn2; }
};

// Elements per block. The offset is settled once a block; a second look at a block hits the L1
// cache.
constexpr int64_t kSoftmaxBlock = 2048;

// A block is done again with a new offset if one of its d_v is above this: far from overflow, and
// small enough that log_sum, which then holds the difference, keeps its precision.
constexpr float kOffsetSlack = 8.0f;

// 2^d is 0 below; the bound keeps (-inf) * 0 out of weighted sums.
constexpr float kLowestLog2 = -150.0f;

// Calls body(vector of logits, accumulator index) over count elements; the last vector is filled up
// with -inf.
template <int kUnroll, typename T, typename Body>
inline void for_each_vector(const T* x, int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) body(load(x + i + u * kLanes), u);
  }
  for (; i + kLanes <= count; i += kLanes) body(load(x + i), 0);
  if (i < count) body(load_partial(x + i, count - i, -kInf), 1);
}

constexpr int kUnroll = 4;

inline float sum_of(const vfloat (&v)[kUnroll]) {
  return reduce_add((v[0] + v[1]) + (v[2] + v[3]));
}

inline float max_of(const vfloat (&v)[kUnroll]) {
  return reduce_max(vmax(vmax(v[0], v[1]), vmax(v[2], v[3])));
}

// Whether x comes before y as the arg max, wherever they stand: NaN is above all numbers.
inline bool above(float x, float y) { return x > y || (x != x && y == y); }

// The largest of `count` elements, NaN if one is, -inf if there are none.
template <typename T>
float largest(const T* x, int64_t count) {
  vfloat top[kUnroll];
  vint is_nan = {};
  for (auto& t : top) t = broadcast(-kInf);
  for_each_vector<kUnroll>(x, count, [&](vfloat logit, int u) {
    top[u] = vmax(logit, top[u]);
    is_nan |= logit != logit;
  });
  return any(is_nan) ? NAN : max_of(top);
}

// Whether a token is the arg max of its row, the first of equals. Scale, soft cap and temperature
// keep the order of logits, so they are compared as they are. Columns come in order.
struct Top1 {
  int64_t token_id;
  float top;    // the largest of the columns so far; once the token came, its logit
  bool is_top;  // the token is the arg max so far

  template <typename T>
  void add(const T* x, int64_t begin, int64_t count) {
    const int64_t place = token_id - begin;
    if (place >= count) {
      const float block_top = largest(x, count);
      if (above(block_top, top)) top = block_top;
    } else if (place >= 0) {
      const float target = to_float(x[place]), before = largest(x, place);
      is_top = token_id == 0 || (above(target, top) && above(target, before));
      top = target;
      is_top = is_top && !above(largest(x + place + 1, count - place - 1), top);
    } else if (is_top) {
      is_top = !above(largest(x, count), top);
    }
  }
};

// Adds the row to `top1` as well, if that is not null.
template <bool kSoftcap, bool kMean, typename T>
RowStats softmax_row_stats(const T* logits, int64_t vocab, LogitMap map, Top1* top1 = nullptr) {
  const float scale = map.scale();
  float offset = -kInf, sum = 0.0f, weighted = 0.0f;
  for (int64_t begin = 0; begin < vocab; begin += kSoftmaxBlock) {
    const T* x = logits + begin;
    const int64_t count = std::min(kSoftmaxBlock, vocab - begin);
    auto raise_offset = [&] {
      vfloat top[kUnroll];
      for (auto& t : top) t = broadcast(-kInf);
      for_each_vector<kUnroll>(x, count,
                               [&](vfloat logit, int u) { top[u] = vmax(logit, top[u]); });
      float raised = map.capped<kSoftcap>(broadcast(max_of(top)))[0];
      if (offset != -kInf) {
        float shift = (offset - raised) * scale, rescale = exp2(broadcast(shift))[0];
        weighted = (weighted + shift * sum) * rescale;
        sum *= rescale;
      }
      offset = raised;
    };
    if (offset == -kInf) raise_offset();
    float block_sum, block_weighted, block_top;
    auto add_block = [&] {
      const float base = offset == -kInf ? 0.0f : offset;  // a block of -inf adds 2^-inf = 0
      vfloat s[kUnroll], w[kUnroll], top[kUnroll];
      for (int u = 0; u < kUnroll; ++u) s[u] = w[u] = broadcast(0.0f), top[u] = broadcast(-kInf);
      for_each_vector<kUnroll>(x, count, [&](vfloat logit, int u) {
        vfloat d = (map.capped<kSoftcap>(logit) - base) * scale;
        vfloat e = exp2(d);
        top[u] = vmax(d, top[u]);
        s[u] += e;
        if constexpr (kMean) w[u] += e * vmax(broadcast(kLowestLog2), d);
      });
      block_sum = sum_of(s), block_weighted = sum_of(w), block_top = max_of(top);
    };
    add_block();
    if (block_top > kOffsetSlack) {
      raise_offset();
      add_block();
    }
    sum += block_sum;
    weighted += block_weighted;
    if (top1 != nullptr) top1->add(x, begin, count);
  }
  if (sum != sum) return {0.0f, NAN, NAN};
  if (offset == -kInf) return {offset, 0.0f, 0.0f};
  return {offset, std::log2(sum), kMean ? weighted / sum : 0.0f};
}

// log p of one token; never above 0. A row without any logit above -inf gives -inf.
template <bool kSoftcap, typename T>
float softmax_row_logprob(const T* logits, int64_t token_id, const RowStats& stats, LogitMap map) {
  if (stats.is_dead()) return -kInf;
  float x = map.capped<kSoftcap>(broadcast(to_float(logits[token_id])))[0];
  float logprob = ((x - stats.offset) * map.scale() - stats.log_sum) * kLn2;
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
// `out` may be `logits` itself; token_id -1: the target is not among these columns.
template <bool kSoftcap, bool kEntropy, typename T, typename Out>
void softmax_row_gradient(const T* logits, int64_t vocab, int64_t token_id, const RowStats& stats,
                          float logprob, RowUpstream up, LogitMap map, Out* out) {
  if (stats.is_dead()) {  // no distribution, no gradient
    std::memset(out, 0, vocab * sizeof(Out));
    return;
  }
  const float scale = map.scale();
  const float entropy = stats.entropy();
  const float dlogprob = up.dlogprob * map.inv_temperature;
  const float dentropy = up.dentropy * map.inv_temperature;
  const float inv_softcap = kSoftcap ? 1.0f / map.softcap : 0.0f;
  auto gradient = [&](vfloat logit) {
    vfloat x = map.capped<kSoftcap>(logit);
    vfloat log2p = (x - stats.offset) * scale - stats.log_sum;
    vfloat p = exp2(log2p);
    vfloat d = p * -dlogprob;
    if constexpr (kEntropy) {
      d -= dentropy * p * (vmax(broadcast(kLowestLog2), log2p) * kLn2 + entropy);
    }
    if constexpr (kSoftcap) {
      vfloat t = x * inv_softcap;
      d *= logit == broadcast(-kInf) ? broadcast(0.0f) : 1.0f - t * t;
    }
    return d;
  };
  // The target's entry uses 1 - p = -expm1(log p), exact where p rounds to 1; read before `out`
  // overwrites it.
  const float target = token_id < 0 ? 0.0f : to_float(logits[token_id]);
  float d = -dlogprob * std::expm1(logprob);
  if constexpr (kEntropy) {
    float p = std::exp(logprob);
    if (p > 0.0f) d -= dentropy * p * (logprob + entropy);
  }
  if constexpr (kSoftcap) {
    float t = map.capped<kSoftcap>(broadcast(target))[0] * inv_softcap;
    d *= target == -kInf ? 0.0f : 1.0f - t * t;
  }
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) store(out + i, gradient(load(logits + i)));
  if (i < vocab) {
    store_partial(out + i, vocab - i, gradient(load_partial(logits + i, vocab - i, -kInf)));
  }
  if (token_id >= 0) store_scalar(out + token_id, d);
}

}  // namespace fastrl::cpu::FASTRL_ISA
