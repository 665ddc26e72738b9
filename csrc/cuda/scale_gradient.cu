// What a backward pass does with a gradient that its forward pass has formed.
#include <algorithm>

#include "ops.h"
#include "packs.cuh"

namespace fastrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 4096;  // at most: enough for every GPU, and few to begin for nothing

// The factor is 1 where backward() was called on the loss itself: nothing else is read then.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_gradient_kernel(T* gradient, int64_t size, const float* factor) {
  constexpr int kSize = Pack<T>::kSize;
  const float by = *factor;
  if (by == 1.0f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * kSize;
  for (int64_t begin = first; begin < size; begin += step) {
    const int64_t end = min(begin + kSize, size);
    if (begin + kSize == end && misalignment(gradient) == 0) {
      Words<T> pack = load_aligned(gradient + begin);
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.set(j, from_float<T>(by * pack.get(j)));
      store_aligned(gradient + begin, pack);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        gradient[i] = from_float<T>(by * to_float(gradient[i]));
      }
    }
  }
}

}  // namespace

void scale_gradient(void* gradient, int dtype, int64_t size, const float* factor, void* stream) {
  if (size == 0) return;
  dispatch_dtype(dtype, "scale_gradient", [&](auto tag) {
    using T = decltype(tag);
    const int64_t blocks = ceil_div<int64_t>(size, kThreads * Pack<T>::kSize);
    FASTRL_LAUNCH(scale_gradient_kernel<T>, grid_of(std::min(blocks, kBlocks)), kThreads, 0, stream,
                  static_cast<T*>(gradient), size, factor);
  });
  check_launch("scale_gradient");
}

}  // namespace fastrl::cuda
