// The gradient of a row's log-prob and entropy with respect to its logits: elementwise, so it can
// be cut anywhere. Multiplications and additions are fused by hand, so that an element's bits do
// not depend on where the compiler would fuse them.
#pragma once

#include "softmax_row.cuh"

namespace fastrl::cuda {

enum class Gradient {
  logprob,   // dlogprob * d log p_t
  combined,  // dlogprob * d log p_t + dentropy * d H
  both       // the two, into separate outputs
};

// d log p_t / d logit_v = ([v = t] - p_v) * slope_v
// d H / d logit_v = -p_v * (log p_v + H) * slope_v
// slope_v = (1 - (x_v / softcap)^2) / temperature
template <bool kSoftcap, Gradient kGradient>
class RowGradient {
 public:
  __device__ RowGradient(const RowResult& row, float dlogprob, float dentropy, const LogitMap& map)
      : map_(map),
        row_(row),
        scale_(map.scale()),
        dlogprob_(dlogprob * map.inv_temperature),
        dentropy_(dentropy * map.inv_temperature),
        inv_softcap_(kSoftcap ? 1.0f / map.softcap : 0.0f) {
    const float p = expf(row.logprob);
    target_ = -dlogprob_ * expm1f(row.logprob);  // 1 - p = -expm1(log p), exact where p rounds to 1
    target_entropy_ = p == 0.0f ? 0.0f : p * (row.logprob + row.entropy);
  }

  // No distribution: no gradient.
  __device__ bool is_dead() const { return row_.offset == -INFINITY; }

  __device__ void at(float logit, bool is_target, float& first, float& second) const {
    const float x = map_.template capped<kSoftcap>(logit);
    const float log2p = fmaf(x - row_.offset, scale_, -row_.log_sum);
    const float p = exp2_approx(log2p);
    first = is_target ? target_ : -dlogprob_ * p;
    if (kGradient != Gradient::logprob) {
      float h = p * fmaf(fmaxf(log2p, kLowestLog2), kLn2, row_.entropy);
      if (is_target) h = target_entropy_;
      if (kGradient == Gradient::combined) first = fmaf(-dentropy_, h, first);
      if (kGradient == Gradient::both) second = -dentropy_ * h;
    }
    if (kSoftcap) {
      const float t = x * inv_softcap_;
      const float slope = logit == -INFINITY ? 0.0f : fmaf(-t, t, 1.0f);
      first *= slope;
      if (kGradient == Gradient::both) second *= slope;
    }
  }

 private:
  LogitMap map_;
  RowResult row_;
  float scale_, dlogprob_, dentropy_, inv_softcap_;
  float target_, target_entropy_;  // of the target, before the slope
};

// Elements begin .. begin + Pack<Out>::kSize - 1 of the `count` that start at `x`, in packs of T.
template <typename T, typename Out>
struct Loaded {
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr int kPacks = Pack<Out>::kSize / kSize;
  static_assert(kPacks >= 1, "gradients are no wider than the logits");

  Words<T> packs[kPacks];

  __device__ void load(const T* x, int64_t begin, int64_t count) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_pack(x, begin + i * kSize, count, T{});
  }

  __device__ float get(int j) const { return packs[j / kSize].get(j % kSize); }
};

// A block writes the gradient of x[0 .. count) to `out`, which may be x itself, and with
// Gradient::both the entropy's to `second`. `target` is the target's place among these elements, if
// it is one of them.
template <bool kSoftcap, Gradient kGradient, typename T, typename Out>
__device__ void gradient_span(const RowGradient<kSoftcap, kGradient>& gradient, const T* x,
                              int64_t count, int64_t target, Out* out, Out* second) {
  constexpr int kSize = Pack<Out>::kSize;
  constexpr int kBatch = (kGradient == Gradient::both ? 2 : 4) / Loaded<T, Out>::kPacks;
  if (gradient.is_dead()) {
    zero_span(out, count);
    if (kGradient == Gradient::both) zero_span(second, count);
    return;
  }
  const PackSpan<Out> span(out, count);
  if (span.single >= 0) {
    float a, b;
    gradient.at(to_float(x[span.single]), span.single == target, a, b);
    out[span.single] = from_float<Out>(a);
    if (kGradient == Gradient::both) second[span.single] = from_float<Out>(b);
  }
  for (int64_t first = threadIdx.x; first < span.packs; first += kBatch * kRowThreads) {
    Loaded<T, Out> loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // all loads before the first store
      const int64_t pack = first + i * kRowThreads;
      if (pack < span.packs) loaded[i].load(x, span.head + pack * kSize, count);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t pack = first + i * kRowThreads;
      if (pack >= span.packs) break;
      const int64_t begin = span.head + pack * kSize;
      const int64_t away = target - begin;
      const int place = away >= 0 && away < kSize ? static_cast<int>(away) : -1;
      Words<Out> firsts{}, seconds{};
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        float a, b;
        gradient.at(loaded[i].get(j), j == place, a, b);
        firsts.set(j, from_float<Out>(a));
        if (kGradient == Gradient::both) seconds.set(j, from_float<Out>(b));
      }
      store_aligned(out + begin, firsts);
      if (kGradient == Gradient::both) store_pack(second + begin, seconds);
    }
  }
}

struct GradientArguments {
  Rows logits;
  const int64_t* token_ids;
  const bool* mask;  // null: keep all
  const float *row_stats, *logprobs, *entropy;
  const float *dlogprobs, *dentropy;  // null: 1
  Rows out;                           // may be the logits' own memory
  Rows entropy_out;                   // for Gradient::both
  int64_t rows;
  int64_t columns;
  int64_t begin;  // place of the first column in the vocabulary
  LogitMap map;
};

// A block for each piece of a row.
template <bool kSoftcap, Gradient kGradient, typename T, typename Out>
__global__ void __launch_bounds__(kRowThreads, 3) softmax_gradient_kernel(GradientArguments g) {
  constexpr int64_t kPiece = kSlots * kTile<T>;
  const int64_t pieces = pieces_of<T>(g.columns);
  for (int64_t i = blockIdx.x; i < g.rows * pieces; i += gridDim.x) {
    const int64_t row = i / pieces, begin = i % pieces * kPiece;
    const int64_t count = min(kPiece, g.columns - begin);
    Out* out = row_pointer<Out>(g.out, row) + begin;
    Out* second = nullptr;
    if (kGradient == Gradient::both) second = row_pointer<Out>(g.entropy_out, row) + begin;
    // What the row is given is asked for together with the mask: the logits wait for both.
    RowResult result{g.row_stats[2 * row], g.row_stats[2 * row + 1], 0.0f, g.logprobs[row]};
    if (kGradient != Gradient::logprob) result.entropy = g.entropy[row];
    const float dlogprob = g.dlogprobs == nullptr ? 1.0f : g.dlogprobs[row];
    const bool has_dentropy = kGradient == Gradient::combined && g.dentropy != nullptr;
    const float dentropy = has_dentropy ? g.dentropy[row] : 1.0f;
    const int64_t token_id = g.token_ids[row];
    if (g.mask != nullptr && !g.mask[row]) {
      zero_span(out, count);
      if (kGradient == Gradient::both) zero_span(second, count);
      continue;
    }
    const RowGradient<kSoftcap, kGradient> gradient(result, dlogprob, dentropy, g.map);
    gradient_span(gradient, row_pointer<const T>(g.logits, row) + begin, count,
                  token_id - g.begin - begin, out, second);
  }
}

template <Gradient kGradient, typename T, typename Out>
void launch_gradient(const GradientArguments& arguments, void* stream) {
  const GradientArguments g = arguments;
  const int64_t blocks = g.rows * pieces_of<T>(g.columns);
  if (blocks == 0) return;
  const auto kernel = g.map.softcap > 0 ? softmax_gradient_kernel<true, kGradient, T, Out>
                                        : softmax_gradient_kernel<false, kGradient, T, Out>;
  FASTRL_LAUNCH(kernel, grid_of(blocks), kRowThreads, 0, stream, g);
}

}  // namespace fastrl::cuda
