// Clipped PPO loss of policy and critic: loss, gradients and statistics in one pass. Every block
// takes a fixed number of tokens and leaves their part of the sums; one block makes them one, so
// no bit depends on the GPU.
//
// Gradients are divided by the number of kept tokens unless a denominator is given. The count is
// taken by a kernel of its own ahead of the pass: it reads one of the 27 bytes of a token, most of
// them into the L2 cache, where the pass finds them again. Scaling the gradients afterwards would
// read and write them once more.
#include "kl.cuh"
#include "moments.cuh"
#include "ops.h"
#include "span.cuh"

namespace fastrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSpans = 2;  // of a warp
constexpr int kTokens = kSpans * kItems;
constexpr int kChunk = kThreads * kTokens;  // tokens of a block
constexpr int kCountBlocks = 1024;
constexpr int kTotalThreads = 512;

enum Sum { kPolicy, kValue, kEntropy, kApproxKl, kClipped, kValueClipped, kRatio, kKl, kSums };
using ChunkPart = Part<kSums>;  // moments are of returns and of returns - values

struct Inputs {
  const float* logprobs;
  const float* values;
  const float* entropy;  // may be null
  const float* old_logprobs;
  const float* old_values;
  const float* advantages;
  const float* returns;
  const bool* mask;
  int64_t size;
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

struct Token {
  float logprob, old_logprob, value, old_value, advantage, target;
};

// The terms of one token and their derivatives by logprob and value.
struct Terms {
  float policy, value, approx_kl, kl, ratio, dpolicy, dvalue;
  bool clipped, value_clipped;
};

__host__ __device__ inline Terms terms_of(const Token& t, const Options& o) {
  Terms terms;
  const float log_ratio = t.logprob - t.old_logprob;
  const float bounded = clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio);
  const bool outside = log_ratio > kMaxLogRatio || log_ratio < -kMaxLogRatio;
  terms.ratio = expf(bounded);
  terms.approx_kl = exp_minus_linear(bounded, terms.ratio);
  terms.kl = -bounded;
  const float unclipped = -t.advantage * terms.ratio;
  const float clipped = -t.advantage * clamp(terms.ratio, o.ratio_low, o.ratio_high);
  terms.clipped = clipped > unclipped;
  terms.policy = terms.clipped ? clipped : unclipped;
  const float bound = -o.dual_clip * t.advantage;
  const bool is_bounded = t.advantage < 0.0f && terms.policy > bound;
  if (is_bounded) terms.policy = bound;
  // d(-A r) / d logprob = -A r; the clipped and bounded branches are constant.
  terms.dpolicy = terms.clipped || is_bounded || outside ? 0.0f : unclipped;

  const float error = t.value - t.target;
  const float near =
      clamp(t.value, t.old_value - o.vf_clip_coef, t.old_value + o.vf_clip_coef) - t.target;
  terms.value_clipped = near * near > error * error;
  terms.value = 0.5f * (terms.value_clipped ? near * near : error * error);
  terms.dvalue = terms.value_clipped ? 0.0f : error;
  return terms;
}

// Partial counts of kept tokens, one a block.
__global__ void __launch_bounds__(kThreads)
    ppo_loss_count_kernel(const bool* mask, int64_t size, int64_t* counts) {
  __shared__ int64_t scratch[kWarps];
  const int64_t step = gridDim.x * int64_t{kThreads};
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t packs = is_aligned<16>(mask) ? size / 16 : 0;
  int64_t count = 0;
  for (int64_t i = thread; i < packs; i += step) {
    const auto pack = reinterpret_cast<const Pack<uint32_t>*>(mask)[i];
#pragma unroll
    for (const uint32_t bytes : pack.values) {  // bit 7 of every byte that is not 0
      count += __popc((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u);
    }
  }
  for (int64_t i = packs * 16 + thread; i < size; i += step) count += mask[i] ? 1 : 0;
  count = block_reduce(count, [](int64_t a, int64_t b) { return a + b; }, scratch);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// 1 / denominator in every thread; without one, of the number of kept tokens.
__device__ inline float scale_of(const float* denominator, const int64_t* counts, int count_blocks,
                                 int64_t* scratch) {
  if (denominator != nullptr) return 1.0f / *denominator;
  int64_t count = 0;
  for (int i = threadIdx.x; i < count_blocks; i += kThreads) count += counts[i];
  count = block_reduce(count, [](int64_t a, int64_t b) { return a + b; }, scratch);
  return 1.0f / static_cast<float>(count > 0 ? count : 1);
}

// The tokens of one lane.
struct Tokens {
  Span span[kSpans];
  float logprob[kTokens], old_logprob[kTokens], value[kTokens], old_value[kTokens];
  float advantage[kTokens], target[kTokens], entropy[kTokens];
  uint32_t flags[kSpans];

  __device__ unsigned kept() const {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kSpans; ++k) bits |= bits_of(flags[k]) << k * kItems;
    return bits;
  }
};

__device__ inline void load_tokens(const Inputs& x, float* tile, Tokens& tokens) {
  const int64_t first = blockIdx.x * int64_t{kChunk} + threadIdx.x / kWarp * (kSpans * kSpan);
#pragma unroll
  for (int k = 0; k < kSpans; ++k) {
    const Span span = span_between(first + k * kSpan, x.size, tile);
    const int i = k * kItems;
    tokens.span[k] = span;
    tokens.flags[k] = load_flags(x.mask, span);
    load(x.logprobs, span, tokens.logprob + i);
    load(x.old_logprobs, span, tokens.old_logprob + i);
    load(x.values, span, tokens.value + i);
    load(x.old_values, span, tokens.old_value + i);
    load(x.advantages, span, tokens.advantage + i);
    load(x.returns, span, tokens.target + i);
    if (x.entropy != nullptr) load(x.entropy, span, tokens.entropy + i);
  }
}

__device__ inline void store_gradient(float* gradient, const Tokens& tokens, const float* values) {
  if (gradient == nullptr) return;
#pragma unroll
  for (int k = 0; k < kSpans; ++k) store(gradient, tokens.span[k], values + k * kItems);
}

// Writes the gradients of a lane's tokens; what the warp's tokens contribute.
__device__ inline ChunkPart warp_part(const Inputs& x, const Options& o, const Gradients& g,
                                      const Tokens& t, float scale, float& ratio_max) {
  const unsigned kept = t.kept();
  float sums[kSums] = {};
  float dlogprob[kTokens], dvalue[kTokens], dentropy[kTokens], residual[kTokens];
  ratio_max = 0.0f;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    dlogprob[i] = dvalue[i] = dentropy[i] = residual[i] = 0.0f;
    if (!has(kept, i)) continue;
    const Terms terms = terms_of(
        {t.logprob[i], t.old_logprob[i], t.value[i], t.old_value[i], t.advantage[i], t.target[i]},
        o);
    sums[kPolicy] += terms.policy;
    sums[kValue] += terms.value;
    sums[kEntropy] += x.entropy != nullptr ? t.entropy[i] : 0.0f;
    sums[kApproxKl] += terms.approx_kl;
    sums[kClipped] += terms.clipped ? 1.0f : 0.0f;
    sums[kValueClipped] += terms.value_clipped ? 1.0f : 0.0f;
    sums[kRatio] += terms.ratio;
    sums[kKl] += terms.kl;
    ratio_max = fmaxf(ratio_max, terms.ratio);
    dlogprob[i] = terms.dpolicy * scale;
    dvalue[i] = terms.dvalue * (o.vf_coef * scale);
    dentropy[i] = -o.ent_coef * scale;
    residual[i] = t.target[i] - t.value[i];
  }
  store_gradient(g.dlogprobs, t, dlogprob);
  store_gradient(g.dvalues, t, dvalue);
  store_gradient(g.dentropy, t, dentropy);
  ChunkPart part;
#pragma unroll
  for (int k = 0; k < kSums; ++k) part.sums[k] = lanes_sum(sums[k], kWarp);
  const float n = lanes_sum(static_cast<float>(__popc(kept)), kWarp);
  part.n = n;
  part.moments[0] = lanes_moments<kTokens>(t.target, kept, n, kWarp);
  part.moments[1] = lanes_moments<kTokens>(residual, kept, n, kWarp);
  ratio_max = warp_reduce(ratio_max, [](float a, float b) { return fmaxf(a, b); });
  return part;
}

__global__ void __launch_bounds__(kThreads)
    ppo_loss_kernel(Inputs x, Options o, Gradients g, const float* denominator,
                    const int64_t* counts, int count_blocks, double* parts, double* ratio_maxima) {
  __shared__ float tiles[kWarps][kSpan];
  __shared__ int64_t scratch[kWarps];
  __shared__ ChunkPart of_warps[kWarps];
  __shared__ float maxima[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Tokens tokens;
  load_tokens(x, tiles[warp], tokens);
  const float scale = scale_of(denominator, counts, count_blocks, scratch);
  float ratio_max;
  const ChunkPart part = warp_part(x, o, g, tokens, scale, ratio_max);
  if (lane == 0) {
    of_warps[warp] = part;
    maxima[warp] = ratio_max;
  }
  __syncthreads();
  if (warp > 0) return;
  const ChunkPart whole = combine_warps(of_warps);
  if (lane > 0) return;
  whole.store(parts, gridDim.x, blockIdx.x);
  for (const float other : maxima) ratio_max = fmaxf(ratio_max, other);
  ratio_maxima[blockIdx.x] = ratio_max;
}

// In the order of PPOStats (fastrl/ops/ppo_loss.py).
__device__ void write_stats(const ChunkPart& total, double ratio_max, float* stats) {
  const double n = total.n > 1 ? total.n : 1.0, ratio = total.sums[kRatio];
  stats[0] = static_cast<float>(total.n);
#pragma unroll
  for (int k = 0; k < kKl; ++k) stats[1 + k] = static_cast<float>(total.sums[k] / n);
  stats[8] = static_cast<float>(ratio == ratio ? ratio_max : ratio);  // NaN stays NaN
  stats[9] = explained_variance(variance(total.moments[1], total.n),
                                variance(total.moments[0], total.n), total.moments[0].mean);
  stats[10] = static_cast<float>(total.sums[kKl] / n);
}

// One block: the parts of all chunks become loss and statistics.
__global__ void __launch_bounds__(kTotalThreads)
    ppo_loss_total_kernel(const double* parts, const double* ratio_maxima, int64_t chunks,
                          Options o, const float* denominator, float* loss, float* stats) {
  __shared__ ChunkPart of_warps[kTotalThreads / kWarp];
  __shared__ double maxima[kTotalThreads / kWarp];
  double ratio_max = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kTotalThreads) {
    ratio_max = fmax(ratio_max, ratio_maxima[i]);
  }
  ratio_max = block_reduce(ratio_max, [](double a, double b) { return fmax(a, b); }, maxima);
  const ChunkPart total = combine_columns(parts, chunks, of_warps);
  if (threadIdx.x > 0) return;
  const double tokens = total.n > 1 ? total.n : 1.0;
  const double sum =
      total.sums[kPolicy] + o.vf_coef * total.sums[kValue] - o.ent_coef * total.sums[kEntropy];
  *loss = static_cast<float>(sum / (denominator != nullptr ? *denominator : tokens));
  write_stats(total, ratio_max, stats);
}

}  // namespace

// Parts, then every chunk's largest ratio, then counts.
int64_t ppo_loss_workspace(int64_t size) {
  return ceil_div<int64_t>(size, kChunk) * (ChunkPart::kColumns + 1) + kCountBlocks;
}

void ppo_loss(int64_t size, const float* logprobs, const float* values, const float* entropy,
              const float* old_logprobs, const float* old_values, const float* advantages,
              const float* returns, const bool* mask, const float* denominator, double clip_coef,
              float vf_clip_coef, float vf_coef, float ent_coef, float dual_clip, float* loss,
              float* stats, float* dlogprobs, float* dvalues, float* dentropy, double* workspace,
              void* stream) {
  const Inputs x{logprobs,   values,  entropy, old_logprobs, old_values,
                 advantages, returns, mask,    size};
  const Options options{static_cast<float>(1.0 - clip_coef),
                        static_cast<float>(1.0 + clip_coef),
                        vf_clip_coef,
                        vf_coef,
                        ent_coef,
                        dual_clip};
  const int64_t chunks = ceil_div<int64_t>(size, kChunk);
  double* ratio_maxima = workspace + chunks * ChunkPart::kColumns;
  auto* counts = reinterpret_cast<int64_t*>(ratio_maxima + chunks);
  const int count_blocks =
      static_cast<int>(std::min<int64_t>(kCountBlocks, ceil_div<int64_t>(size, kThreads * 16)));
  if (size > 0 && denominator == nullptr) {
    FASTRL_LAUNCH(ppo_loss_count_kernel, count_blocks, kThreads, 0, stream, mask, size, counts);
  }
  if (size > 0) {
    FASTRL_LAUNCH(ppo_loss_kernel, static_cast<unsigned>(chunks), kThreads, 0, stream, x, options,
                  (Gradients{dlogprobs, dvalues, dentropy}), denominator, counts, count_blocks,
                  workspace, ratio_maxima);
  }
  FASTRL_LAUNCH(ppo_loss_total_kernel, 1, kTotalThreads, 0, stream, workspace, ratio_maxima, chunks,
                options, denominator, loss, stats);
  check_launch("ppo_loss");
}

}  // namespace fastrl::cuda
