// Copies from global into shared memory that are under way while their thread goes on: they take no
// registers, so a thread may ask for as many as there is room for.
#pragma once

#include <cuda_runtime.h>

namespace fastrl::cuda {

// Sixteen bytes, between 16-byte boundaries.
__device__ inline void begin_copy(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// For the calling thread's own copies. It sees them then; others do after a barrier.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fastrl::cuda
