// Dropout on the input of a LoRA adapter: the mask is a pure function of (seed, row, column), so it
// is never stored and backward makes it again.

#include <algorithm>

#include "../ops.h"
#include "simd.h"

namespace fastrl::cpu::FASTRL_ISA {

namespace {

typedef uint64_t vulong __attribute__((vector_size(kLanes * 8)));

constexpr int kCounters = 16;          // counters of one block
constexpr int kBlock = 4 * kCounters;  // columns of one block: four words for each counter

// factor * x as the high and the low half.
inline void multiply(uint32_t factor, vuint x, vuint* high, vuint* low) {
  vulong product = __builtin_convertvector(x, vulong) * static_cast<uint64_t>(factor);
  *high = __builtin_convertvector(product >> 32, vuint);
  *low = __builtin_convertvector(product, vuint);
}

// Philox4x32-10 (Salmon et al. 2011) for counters (c0, row), one in each lane.
inline void philox(vuint c0, uint64_t row, uint64_t seed, vuint words[4]) {
  vuint c1 = vuint{} + static_cast<uint32_t>(row);
  vuint c2 = vuint{} + static_cast<uint32_t>(row >> 32);
  vuint c3 = {};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vuint high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, &high0, &low0);
    multiply(0xCD9E8D57u, c2, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Word for each of the 64 columns of a block.
inline void block_words(int64_t block, uint64_t row, uint64_t seed, uint32_t out[kBlock]) {
  for (int first = 0; first < kCounters; first += kLanes) {
    vuint counter;
    for (int lane = 0; lane < kLanes; ++lane) {
      counter[lane] = static_cast<uint32_t>(kCounters * block + first + lane);
    }
    vuint words[4];
    philox(counter, row, seed, words);
    for (int w = 0; w < 4; ++w) {
      std::memcpy(out + w * kCounters + first, &words[w], sizeof(vuint));
    }
  }
}

}  // namespace

void lora_dropout(void* matrix, int dtype, int64_t rows, int64_t cols, const int64_t* seed,
                  uint32_t threshold, int threads) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  dispatch_dtype(dtype, "lora_dropout", [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      T* row = static_cast<T*>(matrix) + m * cols;
      uint32_t words[kBlock];
      for (int64_t k = 0; k < cols; k += kBlock) {
        block_words(k / kBlock, m, key, words);
        const int64_t count = std::min<int64_t>(kBlock, cols - k);
        for (int64_t i = 0; i < count; ++i) row[k + i] = words[i] >= threshold ? row[k + i] : T{};
      }
    }
  });
}

}  // namespace fastrl::cpu::FASTRL_ISA
