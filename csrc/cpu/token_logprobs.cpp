// Log-prob (entropy, arg max) of given tokens from logits: one pass forward, one read and one write
// backward. Every row is done by one thread in a fixed order, so results do not depend on batch
// size or thread count.

#include "../checks.h"
#include "../ops.h"
#include "softmax_row.h"

namespace fastrl::cpu::FASTRL_ISA {

void token_logprobs_fwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap, float* logprobs,
                        float* row_stats, float* entropy, bool* top1, int threads) {
  const LogitMap map{inv_temperature, softcap};
  int64_t bad_row = rows;
  dispatch_dtype(logits.dtype, "token_logprobs", [&](auto tag) {
    using T = decltype(tag);
    dispatch_flags(softcap > 0, entropy != nullptr, [&](auto cap, auto mean) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) reduction(min : bad_row)
      for (int64_t m = 0; m < rows; ++m) {
        RowStats stats{0.0f, 0.0f, 0.0f};
        Top1 place{token_ids[m], -kInf, false};
        logprobs[m] = 0.0f;
        if (entropy != nullptr) entropy[m] = 0.0f;
        if (mask == nullptr || mask[m]) {
          if (token_ids[m] < 0 || token_ids[m] >= vocab) {
            bad_row = std::min(bad_row, m);
            continue;
          }
          const T* row = logits.row<const T>(m);
          stats = softmax_row_stats<cap.value, mean.value>(row, vocab, map,
                                                           top1 == nullptr ? nullptr : &place);
          logprobs[m] = softmax_row_logprob<cap.value>(row, token_ids[m], stats, map);
          if (entropy != nullptr) entropy[m] = stats.entropy();
        }
        if (top1 != nullptr) top1[m] = place.is_top;
        row_stats[2 * m] = stats.offset;
        row_stats[2 * m + 1] = stats.log_sum;
      }
    });
  });
  check_token_ids(bad_row == rows ? -1 : bad_row, "token_logprobs", vocab, token_ids);
}

void token_logprobs_bwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap,
                        const float* row_stats, const float* logprobs, const float* entropy,
                        const float* dlogprobs, const float* dentropy, Rows dlogits, int threads) {
  const LogitMap map{inv_temperature, softcap};
  dispatch_dtype(logits.dtype, "token_logprobs", [&](auto tag) {
    using T = decltype(tag);
    dispatch_flags(softcap > 0, dentropy != nullptr, [&](auto cap, auto with_entropy) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
      for (int64_t m = 0; m < rows; ++m) {
        T* out = dlogits.row<T>(m);
        if (mask != nullptr && !mask[m]) {
          std::memset(out, 0, vocab * sizeof(T));
          continue;
        }
        RowStats stats{row_stats[2 * m], row_stats[2 * m + 1], 0.0f};
        RowUpstream up{dlogprobs[m], 0.0f};
        if (dentropy != nullptr) {
          stats.mean = stats.log_sum - entropy[m] / kLn2;
          up.dentropy = dentropy[m];
        }
        softmax_row_gradient<cap.value, with_entropy.value>(
            logits.row<const T>(m), vocab, token_ids[m], stats, logprobs[m], up, map, out);
      }
    });
  });
}

}  // namespace fastrl::cpu::FASTRL_ISA
