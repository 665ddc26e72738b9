// GAE of kLanes rows at once: every lane walks its own row, right to left. Shared by gae and
// ppo_advantages.
#pragma once

#include "masks.h"
#include "transpose.h"

namespace fastrl::cpu::FASTRL_ISA {

// (rows, steps) arrays are contiguous; mask, dones, lambdas and bootstrap_value may be null.
struct GaeInputs {
  const float* rewards;
  const float* values;
  const bool* mask;
  const bool* dones;
  const float* lambdas;  // one per row, instead of gae_lambda
  const float* bootstrap_value;
  float gamma;
  float gae_lambda;
  int64_t rows;
  int64_t steps;
};

// Rows first_row .. first_row + kLanes, as far as they exist. Tiles of kLanes steps are loaded
// along time and transposed, so that memory is read in order.
inline void gae_block(const GaeInputs& x, int64_t first_row, float* advantages, float* returns) {
  int64_t row_start[kLanes];
  vfloat decay = broadcast(x.gamma * x.gae_lambda);
  vfloat carry = broadcast(0.0f), next_value = carry;
  for (int r = 0; r < kLanes; ++r) {
    const int64_t row = std::min(first_row + r, x.rows - 1);  // spare lanes repeat the last row
    row_start[r] = row * x.steps;
    if (x.lambdas != nullptr) decay[r] = x.gamma * x.lambdas[row];
    if (x.bootstrap_value != nullptr) next_value[r] = x.bootstrap_value[row];
  }
  const int stored_rows = static_cast<int>(std::min<int64_t>(kLanes, x.rows - first_row));
  auto tile = [&](int64_t begin, auto lanes) {
    vfloat reward[kLanes], value[kLanes], kept[kLanes], done[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t at = row_start[r] + begin;
      reward[r] = load_first(x.rewards + at, lanes);
      value[r] = load_first(x.values + at, lanes);
      // Steps past the end count as dropped.
      kept[r] = bit_cast<vfloat>(load_flags(x.mask == nullptr ? nullptr : x.mask + at, lanes));
      if (x.dones != nullptr) done[r] = bit_cast<vfloat>(load_flags(x.dones + at, lanes));
    }
    transpose(reward);
    transpose(value);
    transpose(kept);
    if (x.dones != nullptr) transpose(done);
    for (int t = kLanes - 1; t >= 0; --t) {
      const vint keep = bit_cast<vint>(kept[t]);
      vfloat after = next_value, carried = carry;
      if (x.dones != nullptr) {
        const vint ends = bit_cast<vint>(done[t]);
        after = ends ? broadcast(0.0f) : after;
        carried = ends ? broadcast(0.0f) : carried;
      }
      const vfloat advantage = (reward[t] + x.gamma * after - value[t]) + decay * carried;
      carry = keep ? advantage : carry;
      next_value = keep ? value[t] : next_value;
      reward[t] = select(keep, advantage);
    }
    transpose(reward);
    for (int r = 0; r < stored_rows; ++r) {
      const int64_t at = row_start[r] + begin;
      const vint keep = load_flags(x.mask == nullptr ? nullptr : x.mask + at, lanes);
      store_first(advantages + at, lanes, reward[r]);
      store_first(returns + at, lanes, select(keep, reward[r] + load_first(x.values + at, lanes)));
    }
  };
  int64_t begin = x.steps / kLanes * kLanes;
  if (begin < x.steps) tile(begin, x.steps - begin);
  while (begin > 0) tile(begin -= kLanes, Full{});
}

}  // namespace fastrl::cpu::FASTRL_ISA
