// Blocks of one cluster: they run at the same time and read each other's shared memory. Code for
// devices without clusters (before sm_90) takes a block for a cluster of its own.
#pragma once

#include <cuda_runtime.h>

namespace fastrl::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ inline unsigned cluster_size() { return __clusterSizeInBlocks(); }

// Waits for all threads of the cluster, which then see what they wrote to any memory.
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// The same in two steps, for what the others have read: nothing that was written is waited for.
__device__ inline void cluster_arrive_relaxed() { __cluster_barrier_arrive_relaxed(); }
__device__ inline void cluster_wait() { __cluster_barrier_wait(); }

// `p`, an address in the block's shared memory, in that of block `rank` of the cluster.
template <typename T>
__device__ T* map_shared(T* p, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
}

#else

__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() { __syncthreads(); }

template <typename T>
__device__ T* map_shared(T* p, unsigned) {
  return p;
}

#endif

}  // namespace fastrl::cuda
