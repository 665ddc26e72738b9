// Table of contents: every host function of the CPU kernels, declared in fastrl::cpu::<FASTRL_ISA>.
// Included once per instruction set, hence no include guard.
//
// Conventions: sizes first, then what Python's op takes, in its order; outputs are preallocated by
// the caller; `mask` may be null (keep all); a `Rows` argument addresses the rows of a tensor whose
// leading dimensions collapse to two; `threads` is the OpenMP team.

#ifndef FASTRL_ISA
#error "define FASTRL_ISA before including ops.h"
#endif

#include <cstdint>

#include "rows.h"

namespace fastrl::cpu::FASTRL_ISA {

// linear_head_*: what linear_logprobs and linear_cross_entropy run between the library's
// multiplications, in this order. `sweeps` and the coefficients are the structs of linear_head.cpp.
void linear_head_begin(Rows x, Rows targets, int64_t rows, int64_t width, float softcap,
                       float* sweeps, int threads);
void linear_head_sweep(Rows logits, const int64_t* token_ids, int64_t begin, int64_t rows,
                       int64_t columns, float inv_temperature, float softcap, bool with_entropy,
                       bool write, Rows products, float* sweeps, bool* top1, int threads);
void linear_head_fold(Rows block, Rows product_block, const float* sweeps, int64_t rows,
                      int64_t width, float* sums, float* weighted, int threads);
void linear_head_finish(const float* sweeps, int64_t rows, float inv_temperature, float softcap,
                        float* logprobs, float* row_stats, float* entropy, float* coefficients,
                        float* entropy_coefficients);
void linear_head_direction(Rows targets, const float* sums, const float* weighted,
                           const float* coefficients, int64_t rows, int64_t width, float* out,
                           int threads);
void linear_head_gradient(Rows logits, const int64_t* token_ids, int64_t begin, int64_t rows,
                          int64_t columns, const float* row_stats, const float* logprobs,
                          const float* entropy, const float* dlogprobs, const float* dentropy,
                          float inv_temperature, float softcap, int threads);
void linear_head_scale(Rows direction, Rows entropy_direction, const bool* mask,
                       const float* dlogprobs, const float* dentropy, int64_t rows, int64_t width,
                       Rows dhidden, int threads);
void lora_dropout(void* matrix, int dtype, int64_t rows, int64_t cols, const int64_t* seed,
                  uint32_t threshold, int threads);
void gae(int64_t rows, int64_t steps, const float* rewards, const float* values, const bool* mask,
         const bool* dones, const float* lambdas, const float* bootstrap_value, float gamma,
         float gae_lambda, float* advantages, float* returns, int threads);
void ppo_advantages(int64_t rows, int64_t steps, const float* logprobs, const float* ref_logprobs,
                    const float* values, const float* scores, const bool* mask, float kl_coef,
                    int kl_estimator, float kl_clip, float score_clip, float gamma,
                    float gae_lambda, bool center, bool scale, float* advantages, float* returns,
                    float* rewards, float* kl, double* moments, float* stats, int threads);
void ppo_loss(int64_t size, const float* logprobs, const float* values, const float* entropy,
              const float* old_logprobs, const float* old_values, const float* advantages,
              const float* returns, const bool* mask, const float* denominator, double clip_coef,
              float vf_clip_coef, float vf_coef, float ent_coef, float dual_clip, float* loss,
              float* stats, float* dlogprobs, float* dvalues, float* dentropy, int threads);
void ranking_loss(int64_t size, const float* scores, const int64_t* group_ids, const double* ranks,
                  const float* margins, float center_coef, float* loss, float* stats,
                  float* dscores, int threads);
void token_logprobs_fwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap, float* logprobs,
                        float* row_stats, float* entropy, bool* top1, int threads);
void token_logprobs_bwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap,
                        const float* row_stats, const float* logprobs, const float* entropy,
                        const float* dlogprobs, const float* dentropy, Rows dlogits, int threads);

}  // namespace fastrl::cpu::FASTRL_ISA
