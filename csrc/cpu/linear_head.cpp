// Row kernels of linear_logprobs and linear_cross_entropy. The library multiplies hidden states
// with a block of the head's weight at a time; these kernels run on the block of logits (rows x
// columns) in between, in the manner of flash attention: the sums over the vocabulary are kept
// relative to a running maximum and rescaled when it grows. The target is kept out of the sums and
// of the multiplication; its terms are added at the end, in fp32. A row is done by one thread in a
// fixed order.

#include "../ops.h"
#include "softmax_row.h"

namespace fastrl::cpu::FASTRL_ISA {

namespace {

// One row's place in the sweep over the vocabulary; d_v = (x_v - max) / temperature * log2(e).
// Python sees it as the columns of a float tensor (see linear_head.py).
struct Sweep {
  float target;    // the target's logit, soft-capped
  float max;       // of the logits so far, target included
  float sum;       // of 2^d_v over the columns so far, target excluded
  float weighted;  // of 2^d_v d_v, the same
  float shift;     // (old max - max) / temperature * log2(e) of the last block
  float top;       // Top1::top, of the logits as they were multiplied
};

// The gradient of log-prob (first three) and entropy with respect to the hidden state is
// target * W_t + sum * (sum_v 2^d_v W_v) + weighted * (sum_v 2^d_v d_v W_v).
struct Coefficients {
  float target, sum, weighted;
};

template <typename A, typename B>
float dot(const A* a, const B* b, int64_t width) {
  constexpr int kUnroll = 4;
  vfloat total[kUnroll];
  for (auto& t : total) t = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= width; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u)
      total[u] += load(a + i + u * kLanes) * load(b + i + u * kLanes);
  }
  for (; i + kLanes <= width; i += kLanes) total[0] += load(a + i) * load(b + i);
  if (i < width) {
    total[1] += load_partial(a + i, width - i, 0.0f) * load_partial(b + i, width - i, 0.0f);
  }
  return reduce_add((total[0] + total[1]) + (total[2] + total[3]));
}

// One block of a row: updates the sums and replaces each logit by 2^d_v, and `products` by
// 2^d_v d_v, both times the soft cap's slope.
template <bool kSoftcap, bool kMean, bool kWrite, typename T>
void sweep_row(T* logits, T* products, int64_t columns, LogitMap map, Sweep& sweep) {
  const float scale = map.inv_temperature * kLog2e;
  vfloat max4 = broadcast(-kInf);
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) max4 = vmax(load(logits + i), max4);
  if (i < columns) max4 = vmax(load_partial(logits + i, columns - i, -kInf), max4);
  const float block_max = map.capped<kSoftcap>(broadcast(reduce_max(max4)))[0];
  sweep.shift = 0.0f;
  if (block_max > sweep.max) {
    // What was summed relative to -inf is 0 and stays 0.
    sweep.shift = sweep.max == -kInf ? kLowestLog2 : (sweep.max - block_max) * scale;
    const float rescale = exp2(broadcast(sweep.shift))[0];
    if constexpr (kMean) {
      sweep.weighted = (sweep.weighted + std::max(sweep.shift, kLowestLog2) * sweep.sum) * rescale;
    }
    sweep.sum *= rescale;
    sweep.max = block_max;
  }
  const float reference = sweep.max == -kInf ? 0.0f : sweep.max;
  vfloat sum[2] = {broadcast(0.0f), broadcast(0.0f)}, weighted = broadcast(0.0f);
  auto step = [&](vfloat logit, int u, auto&& write) {
    vfloat x = map.capped<kSoftcap>(logit);
    vfloat d = (x - reference) * scale;
    vfloat e = exp2(d);
    vfloat product = broadcast(0.0f);
    sum[u] += e;
    if constexpr (kMean) {
      product = e * vmax(broadcast(kLowestLog2), d);
      weighted += product;
    }
    if constexpr (kSoftcap && kWrite) {
      vfloat t = x * (1.0f / map.softcap);
      vfloat slope = logit == broadcast(-kInf) ? broadcast(0.0f) : 1.0f - t * t;
      e *= slope;
      product *= slope;
    }
    if constexpr (kWrite) write(e, product);
  };
  auto full = [&](int64_t at, int u) {
    step(load(logits + at), u, [&](vfloat e, vfloat product) {
      store(logits + at, e);
      if constexpr (kMean) store(products + at, product);
    });
  };
  for (i = 0; i + 2 * kLanes <= columns; i += 2 * kLanes) {
    full(i, 0);
    full(i + kLanes, 1);
  }
  if (i + kLanes <= columns) {
    full(i, 0);
    i += kLanes;
  }
  if (i < columns) {
    step(load_partial(logits + i, columns - i, -kInf), 1, [&](vfloat e, vfloat product) {
      store_partial(logits + i, columns - i, e);
      if constexpr (kMean) store_partial(products + i, columns - i, product);
    });
  }
  sweep.sum += reduce_add(sum[0] + sum[1]);
  if constexpr (kMean) sweep.weighted += reduce_add(weighted);
}

}  // namespace

void linear_head_begin(Rows x, Rows targets, int64_t rows, int64_t width, float softcap,
                       float* sweeps, int threads) {
  const LogitMap map{1.0f, softcap};
  dispatch_dtype(x.dtype, "linear_head", [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      float target = dot(x.row<const T>(m), targets.row<const T>(m), width);
      if (softcap > 0) target = map.capped<true>(broadcast(target))[0];
      reinterpret_cast<Sweep*>(sweeps)[m] = {target, target, 0.0f, 0.0f, 0.0f, -kInf};
    }
  });
}

void linear_head_sweep(Rows logits, const int64_t* token_ids, int64_t begin, int64_t rows,
                       int64_t columns, float inv_temperature, float softcap, bool with_entropy,
                       bool write, Rows products, float* sweeps, bool* top1, int threads) {
  const LogitMap map{inv_temperature, softcap};
  dispatch_dtype(logits.dtype, "linear_head", [&](auto tag) {
    using T = decltype(tag);
    dispatch_flags(softcap > 0, with_entropy, [&](auto cap, auto mean) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t m = 0; m < rows; ++m) {
        T* row = logits.row<T>(m);
        const int64_t target = token_ids[m] - begin;
        Sweep& sweep = reinterpret_cast<Sweep*>(sweeps)[m];
        if (top1 != nullptr) {
          Top1 place{token_ids[m], sweep.top, top1[m]};
          place.add(row, begin, columns);
          sweep.top = place.top, top1[m] = place.is_top;
        }
        if (target >= 0 && target < columns) store_scalar(row + target, -kInf);
        if (write) {
          T* product = with_entropy ? products.row<T>(m) : nullptr;
          sweep_row<cap.value, mean.value, true>(row, product, columns, map, sweep);
        } else {
          sweep_row<cap.value, mean.value, false>(row, row, columns, map, sweep);
        }
      }
    });
  });
}

void linear_head_fold(Rows block, Rows product_block, const float* sweeps, int64_t rows,
                      int64_t width, float* sums, float* weighted, int threads) {
  dispatch_dtype(block.dtype, "linear_head", [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      const float shift = std::max(reinterpret_cast<const Sweep*>(sweeps)[m].shift, kLowestLog2);
      const float rescale = exp2(broadcast(shift))[0];
      const T* b = block.row<const T>(m);
      float* s = sums + m * width;
      const T* pb = weighted == nullptr ? nullptr : product_block.row<const T>(m);
      float* w = weighted == nullptr ? nullptr : weighted + m * width;
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        vfloat sum = load(s + i);
        if (weighted != nullptr) {
          store(w + i, (load(w + i) + shift * sum) * rescale + load(pb + i));
        }
        store(s + i, sum * rescale + load(b + i));
      }
      for (; i < width; ++i) {
        if (weighted != nullptr) w[i] = (w[i] + shift * s[i]) * rescale + to_float(pb[i]);
        s[i] = s[i] * rescale + to_float(b[i]);
      }
    }
  });
}

void linear_head_finish(const float* sweeps, int64_t rows, float inv_temperature, float softcap,
                        float* logprobs, float* row_stats, float* entropy, float* coefficients,
                        float* entropy_coefficients) {
  for (int64_t m = 0; m < rows; ++m) {
    const Sweep& sweep = reinterpret_cast<const Sweep*>(sweeps)[m];
    auto& up = reinterpret_cast<Coefficients*>(coefficients)[m];
    auto& entropy_up = reinterpret_cast<Coefficients*>(entropy_coefficients)[m];
    if (sweep.max == -kInf && sweep.sum == 0.0f) {  // every logit is -inf: no distribution
      logprobs[m] = -kInf;
      entropy[m] = 0.0f;
      row_stats[2 * m] = -kInf;
      row_stats[2 * m + 1] = 0.0f;
      up = entropy_up = {0.0f, 0.0f, 0.0f};
      continue;
    }
    // With odds = (1 - p) / p of the target, log p = -log(1 + odds): exact near p = 1, never
    // above 0.
    const float d = (sweep.target - sweep.max) * inv_temperature;
    const float log_odds = std::log(sweep.sum) - d;
    const float logprob = log_odds > 0.0f ? -(log_odds + std::log1p(std::exp(-log_odds)))
                                          : 0.0f - std::log1p(std::exp(log_odds));
    const float e = std::exp(d);
    const float sum = sweep.sum + e;
    const float log_sum = std::log2(sum);
    const float mean = (sweep.weighted * kLn2 + (e > 0.0f ? e * d : 0.0f)) / sum;
    logprobs[m] = logprob;
    entropy[m] = log_sum * kLn2 - mean;
    row_stats[2 * m] = sweep.max;
    row_stats[2 * m + 1] = log_sum;
    float slope = inv_temperature;
    if (softcap > 0) {
      const float t = sweep.target / softcap;
      slope = sweep.target == -kInf ? 0.0f : inv_temperature * (1.0f - t * t);
    }
    const float p = std::exp(logprob);
    const float rate = inv_temperature / sum;
    up = {-std::expm1(logprob) * slope, -rate, 0.0f};
    entropy_up = {p > 0.0f ? -p * (d - mean) * slope : 0.0f, rate * mean, -rate * kLn2};
  }
}

void linear_head_direction(Rows targets, const float* sums, const float* weighted,
                           const float* coefficients, int64_t rows, int64_t width, float* out,
                           int threads) {
  dispatch_dtype(targets.dtype, "linear_head", [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      const Coefficients& c = reinterpret_cast<const Coefficients*>(coefficients)[m];
      const T* target = targets.row<const T>(m);
      for (int64_t i = m * width; i < (m + 1) * width; ++i) {
        float x = c.target * to_float(target[i - m * width]) + c.sum * sums[i];
        out[i] = weighted == nullptr ? x : x + c.weighted * weighted[i];
      }
    }
  });
}

void linear_head_gradient(Rows logits, const int64_t* token_ids, int64_t begin, int64_t rows,
                          int64_t columns, const float* row_stats, const float* logprobs,
                          const float* entropy, const float* dlogprobs, const float* dentropy,
                          float inv_temperature, float softcap, int threads) {
  const LogitMap map{inv_temperature, softcap};
  dispatch_dtype(logits.dtype, "linear_head", [&](auto tag) {
    using T = decltype(tag);
    dispatch_flags(softcap > 0, dentropy != nullptr, [&](auto cap, auto with_entropy) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t m = 0; m < rows; ++m) {
        RowStats stats{row_stats[2 * m], row_stats[2 * m + 1], 0.0f};
        RowUpstream up{dlogprobs[m], 0.0f};
        if (dentropy != nullptr) {
          stats.mean = stats.log_sum - entropy[m] * kLog2e;
          up.dentropy = dentropy[m];
        }
        const int64_t target = token_ids[m] - begin;
        T* row = logits.row<T>(m);
        softmax_row_gradient<cap.value, with_entropy.value>(
            row, columns, target >= 0 && target < columns ? target : -1, stats, logprobs[m], up,
            map, row);
      }
    });
  });
}

void linear_head_scale(Rows direction, Rows entropy_direction, const bool* mask,
                       const float* dlogprobs, const float* dentropy, int64_t rows, int64_t width,
                       Rows dhidden, int threads) {
  dispatch_dtype(direction.dtype, "linear_head", [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      T* out = dhidden.row<T>(m);
      if (mask != nullptr && !mask[m]) {
        std::memset(out, 0, width * sizeof(T));
        continue;
      }
      const float up = dlogprobs == nullptr ? 0.0f : dlogprobs[m];
      const float entropy_up = dentropy == nullptr ? 0.0f : dentropy[m];
      const T* a = direction.row<const T>(m);
      const T* b = dentropy == nullptr ? nullptr : entropy_direction.row<const T>(m);
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        vfloat x = load(a + i) * up;
        if (dentropy != nullptr) x += load(b + i) * entropy_up;
        store(out + i, x);
      }
      for (; i < width; ++i) {
        float x = to_float(a[i]) * up;
        if (dentropy != nullptr) x += to_float(b[i]) * entropy_up;
        store_scalar(out + i, x);
      }
    }
  });
}

}  // namespace fastrl::cpu::FASTRL_ISA
