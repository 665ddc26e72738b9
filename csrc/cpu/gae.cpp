// Generalised advantage estimation. A row is one lane of one thread, so results do not depend on
// batch size or thread count.

#include "../ops.h"
#include "gae_block.h"

namespace fastrl::cpu::FASTRL_ISA {

void gae(int64_t rows, int64_t steps, const float* rewards, const float* values, const bool* mask,
         const bool* dones, const float* lambdas, const float* bootstrap_value, float gamma,
         float gae_lambda, float* advantages, float* returns, int threads) {
  const GaeInputs inputs{rewards,         values, mask,       dones, lambdas,
                         bootstrap_value, gamma,  gae_lambda, rows,  steps};
#pragma omp parallel for num_threads(team(rows* steps, threads)) schedule(static)
  for (int64_t row = 0; row < rows; row += kLanes) gae_block(inputs, row, advantages, returns);
}

}  // namespace fastrl::cpu::FASTRL_ISA
