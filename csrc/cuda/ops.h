// Table of contents: every host function of the CUDA kernels. Free of CUDA headers.
//
// Conventions as in ../ops.h; pointers are the device's, `stream` is a cudaStream_t, nothing waits
// for the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rows.h"

namespace fastrl::cuda {

void gae(int64_t rows, int64_t steps, const float* rewards, const float* values, const bool* mask,
         const bool* dones, const float* lambdas, const float* bootstrap_value, float gamma,
         float gae_lambda, float* advantages, float* returns, void* stream);

// What the heads run on chunks of float32 logits between the library's multiplications. `out` has
// any of the dtypes; absent rows have data == nullptr. Float32 gradients may take the logits' own
// memory, of 16 bits those of linear_head_rows where linear_head_on_chip(vocab): each row's own,
// the second one behind the first.
//
// Log-prob, statistics, entropy and top1 of each row, and if `out` is there d logprob / d logit in
// it (then row_stats must be), and if `entropy_out` is there d entropy / d logit in it (then
// entropy must be).
void linear_head_rows(Rows logits, const int64_t* token_ids, const bool* mask, int64_t rows,
                      int64_t vocab, float inv_temperature, float softcap, float* logprobs,
                      float* row_stats, float* entropy, bool* top1, Rows out, Rows entropy_out,
                      void* stream);

// Whether the current device keeps whole rows on chip, so that each is read before it is written.
bool linear_head_on_chip(int64_t vocab);

// As token_logprobs_bwd, of logits that hold the columns of the vocabulary from `begin` on.
void linear_head_gradient(Rows logits, const int64_t* token_ids, const bool* mask, int64_t begin,
                          int64_t rows, int64_t columns, const float* row_stats,
                          const float* logprobs, const float* entropy, const float* dlogprobs,
                          const float* dentropy, float inv_temperature, float softcap, Rows out,
                          void* stream);

void lora_dropout(void* matrix, int dtype, int64_t rows, int64_t cols, const int64_t* seed,
                  uint32_t threshold, void* stream);

// With D the dropout of the (rows, cols) matrix x, none if seed is null; dtype bf16 or fp16.
// down (rows, rank) = D(x) lora_a^T; da (rank, cols) = ddown^T D(x), through `workspace`, of
// lora_da_workspace(rows, cols, rank) floats; dx (rows, cols) = D(ddown lora_a). x, lora_a and dx
// have a multiple of 4 columns and rows that start at multiples of 8 bytes.
void lora_down(const void* x, int64_t x_stride, const void* lora_a, int dtype, int64_t rows,
               int64_t cols, int64_t rank, const int64_t* seed, uint32_t threshold, void* down,
               void* stream);
void lora_da(const void* x, int64_t x_stride, const void* ddown, int dtype, int64_t rows,
             int64_t cols, int64_t rank, const int64_t* seed, uint32_t threshold, float* workspace,
             void* da, void* stream);
int64_t lora_da_workspace(int64_t rows, int64_t cols, int64_t rank);
void lora_dx(const void* ddown, const void* lora_a, int dtype, int64_t rows, int64_t cols,
             int64_t rank, const int64_t* seed, uint32_t threshold, void* dx, void* stream);

// ddown (rows, rank) = scaling dy lora_b and db (cols, rank) = scaling dy^T down, for contiguous dy
// (rows, cols) and lora_b (cols, rank), through `workspace`, of lora_up_backward_workspace(rows,
// cols, rank) floats. cols is a multiple of 4; rank and down_stride are even, addresses fit them.
void lora_up_backward(const void* dy, const void* down, int64_t down_stride, const void* lora_b,
                      int dtype, int64_t rows, int64_t cols, int64_t rank, float scaling,
                      float* workspace, void* ddown, int64_t ddown_stride, void* db, void* stream);
int64_t lora_up_backward_workspace(int64_t rows, int64_t cols, int64_t rank);

// Partial sums go through `workspace`, of ppo_advantages_workspace(rows) doubles.
void ppo_advantages(int64_t rows, int64_t steps, const float* logprobs, const float* ref_logprobs,
                    const float* values, const float* scores, const bool* mask, float kl_coef,
                    int kl_estimator, float kl_clip, float score_clip, float gamma,
                    float gae_lambda, bool center, bool scale, float* advantages, float* returns,
                    float* rewards, float* kl, double* moments, float* stats, double* workspace,
                    void* stream);
int64_t ppo_advantages_workspace(int64_t rows);

// Partial sums go through `workspace`, of ppo_loss_workspace(size) doubles.
void ppo_loss(int64_t size, const float* logprobs, const float* values, const float* entropy,
              const float* old_logprobs, const float* old_values, const float* advantages,
              const float* returns, const bool* mask, const float* denominator, double clip_coef,
              float vf_clip_coef, float vf_coef, float ent_coef, float dual_clip, float* loss,
              float* stats, float* dlogprobs, float* dvalues, float* dentropy, double* workspace,
              void* stream);
int64_t ppo_loss_workspace(int64_t size);

// gradient *= *factor, in float32, rounded once; nothing is read or written where that is 1.
void scale_gradient(void* gradient, int dtype, int64_t size, const float* factor, void* stream);

// Bytes of workspace that token_logprobs_fwd needs to split rows over blocks; 0: it does not split.
// The split does not change a bit of the results.
int64_t token_logprobs_workspace(int64_t rows, int64_t vocab, int dtype);

// A token id outside the vocabulary makes its row NaN and is no arg max.
void token_logprobs_fwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap, float* logprobs,
                        float* row_stats, float* entropy, bool* top1, void* workspace,
                        void* stream);
void token_logprobs_bwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap,
                        const float* row_stats, const float* logprobs, const float* entropy,
                        const float* dlogprobs, const float* dentropy, Rows dlogits, void* stream);

}  // namespace fastrl::cuda
