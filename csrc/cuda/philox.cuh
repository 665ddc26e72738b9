// Philox4x32-10 (Salmon et al. 2011), and where dropout finds the word of an element.
#pragma once

#include "launch.h"

namespace fastrl::cuda {

struct PhiloxWords {
  uint32_t w[4];
};

__host__ __device__ inline PhiloxWords philox(uint32_t counter, uint64_t row, uint64_t seed) {
  uint32_t c0 = counter, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32);
  uint32_t c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastrl::cuda
