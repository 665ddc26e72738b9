// LoRA's dropout, made again from the seed wherever it is needed.
#include "ops.h"
#include "philox.cuh"
#include "types.cuh"

namespace fastrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCounters = 16;          // counters of one block of columns
constexpr int kBlock = 4 * kCounters;  // its columns: four words for each counter

// One thread makes the four words of one counter: columns k, k + 16, k + 32, k + 48 of a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_dropout_kernel(T* matrix, int64_t rows, int64_t cols, const int64_t* seed,
                        uint32_t threshold) {
  const int64_t counters = ceil_div<int64_t>(cols, kBlock) * kCounters;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < rows * counters;
       i += step) {
    const int64_t row = i / counters, counter = i % counters;
    const PhiloxWords words = philox(static_cast<uint32_t>(counter), row, *seed);
    const int64_t first = counter / kCounters * kBlock + counter % kCounters;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t col = first + w * kCounters;
      if (col < cols && words.w[w] < threshold) matrix[row * cols + col] = T{};
    }
  }
}

}  // namespace

void lora_dropout(void* matrix, int dtype, int64_t rows, int64_t cols, const int64_t* seed,
                  uint32_t threshold, void* stream) {
  const int64_t work = rows * ceil_div<int64_t>(cols, kBlock) * kCounters;
  if (work == 0) return;
  const unsigned grid =
      static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(work, kThreads), 1 << 16));
  dispatch_dtype(dtype, "lora_dropout", [&](auto tag) {
    using T = decltype(tag);
    FASTRL_LAUNCH(lora_dropout_kernel<T>, grid, kThreads, 0, stream, static_cast<T*>(matrix), rows,
                  cols, seed, threshold);
  });
  check_launch("lora_dropout");
}

}  // namespace fastrl::cuda
