// Table of contents: every host function of the CPU kernels, declared in fastrl::cpu::<FASTRL_ISA>.
// Included once per instruction set, hence no include guard.
//
// Conventions: outputs are preallocated by the caller; `mask` may be null (keep all); a `Rows`
// argument addresses the rows of a tensor whose leading dimensions collapse to two; `threads` is
// the OpenMP team.

#ifndef FASTRL_ISA
#error "define FASTRL_ISA before including ops.h"
#endif

#include <cstdint>

#include "rows.h"

namespace fastrl::cpu::FASTRL_ISA {

void lora_dropout(void* matrix, int dtype, int64_t rows, int64_t cols, const int64_t* seed,
                  uint32_t threshold, int threads);
void token_logprobs_fwd(Rows logits, const int64_t* token_ids, const bool* mask, int64_t rows,
                        int64_t vocab, float inv_temperature, float softcap, float* logprobs,
                        float* row_stats, float* entropy, int threads);
void token_logprobs_bwd(Rows logits, const int64_t* token_ids, const bool* mask,
                        const float* row_stats, const float* logprobs, const float* entropy,
                        const float* dlogprobs, const float* dentropy, int64_t rows, int64_t vocab,
                        float inv_temperature, float softcap, Rows dlogits, int threads);

}  // namespace fastrl::cpu::FASTRL_ISA
