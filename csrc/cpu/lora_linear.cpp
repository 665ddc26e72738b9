// Dropout on the input of a LoRA adapter: the mask is a pure function of (seed, row, column), so it
// is never stored and backward makes it again.

#include <algorithm>
#include <type_traits>

#include "../ops.h"
#include "simd.h"

namespace fastrl::cpu::FASTRL_ISA {

namespace {

constexpr int kCounters = 16;          // counters of one block
constexpr int kBlock = 4 * kCounters;  // columns of one block: four words for each counter

// factor * x as the high and the low half.
inline void multiply(uint32_t factor, vuint x, vuint* high, vuint* low) {
  *low = x * factor;
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32(static_cast<int>(factor)), v = bit_cast<__m512i>(x);
  __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(v, f), 32);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), f);
  *high = bit_cast<vuint>(_mm512_mask_blend_epi32(0xAAAA, even, odd));
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32(static_cast<int>(factor)), v = bit_cast<__m256i>(x);
  __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(v, f), 32);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), f);
  *high = bit_cast<vuint>(_mm256_blend_epi32(even, odd, 0xAA));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    (*high)[lane] = static_cast<uint32_t>(static_cast<uint64_t>(x[lane]) * factor >> 32);
  }
#endif
}

// Philox4x32-10 (Salmon et al. 2011) for the counters (first, row), (first + 1, row), ...
inline void philox(uint32_t first, uint64_t row, uint64_t seed, vuint words[4]) {
  vuint c0, c1 = vuint{} + static_cast<uint32_t>(row), c3 = {};
  for (int lane = 0; lane < kLanes; ++lane) c0[lane] = first + static_cast<uint32_t>(lane);
  vuint c2 = vuint{} + static_cast<uint32_t>(row >> 32);
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

// Zeroes the elements of kLanes neighbours whose word is below the threshold, whatever their type.
inline void select(uint32_t* bits, vuint words, uint32_t threshold) {
  vuint v;
  std::memcpy(&v, bits, sizeof(v));
  v = words >= threshold ? v : vuint{};
  std::memcpy(bits, &v, sizeof(v));
}

inline void select(uint16_t* bits, vuint words, uint32_t threshold) {
  vhalf v;
  std::memcpy(&v, bits, sizeof(v));
  vuint wide = __builtin_convertvector(v, vuint);
  v = __builtin_convertvector(words >= threshold ? wide : vuint{}, vhalf);
  std::memcpy(bits, &v, sizeof(v));
}

template <typename Bits>
void dropout_row(Bits* row, int64_t cols, uint64_t m, uint64_t seed, uint32_t threshold) {
  for (int64_t k = 0; k < cols; k += kBlock) {
    Bits last[kBlock];
    const int64_t count = std::min<int64_t>(kBlock, cols - k);
    Bits* block = row + k;
    if (count < kBlock) {
      std::memcpy(last, row + k, count * sizeof(Bits));
      std::fill(last + count, last + kBlock, Bits{0});
      block = last;
    }
    for (int lane = 0; lane < kCounters; lane += kLanes) {
      vuint words[4];
      philox(static_cast<uint32_t>(k / kBlock * kCounters + lane), m, seed, words);
      for (int w = 0; w < 4; ++w) select(block + w * kCounters + lane, words[w], threshold);
    }
    if (count < kBlock) std::memcpy(row + k, last, count * sizeof(Bits));
  }
}

}  // namespace

void lora_dropout(void* matrix, int dtype, int64_t rows, int64_t cols, const int64_t* seed,
                  uint32_t threshold, int threads) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  dispatch_dtype(dtype, "lora_dropout", [&](auto tag) {
    using Bits = std::conditional_t<sizeof(tag) == 4, uint32_t, uint16_t>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      dropout_row(static_cast<Bits*>(matrix) + m * cols, cols, static_cast<uint64_t>(m), key,
                  threshold);
    }
  });
}

}  // namespace fastrl::cpu::FASTRL_ISA
