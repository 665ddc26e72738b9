// Kernels with one fault each, which the checks must report, and the same without it.
#include "cuda/launch.h"
#include "faults.h"

namespace fastrl::cuda {
namespace {

constexpr int kThreads = 64;

struct alignas(16) Pack16 {
  float x[4];
};

__global__ void outside(float* x, int64_t n) { x[blockIdx.x * kThreads + threadIdx.x] = n; }

__global__ void misaligned(float* x, int offset) {
  if (threadIdx.x == 0) reinterpret_cast<Pack16*>(x + offset)->x[0] = 1.0f;
}

template <bool kWait>
__global__ void reverse(float* x) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = threadIdx.x;
  if (kWait) __syncthreads();
  x[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kWait>
__global__ void neighbour(float* x) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = threadIdx.x;
  if (kWait) __syncwarp();
  x[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void same_element(float* x, int blocks_share) {
  if (threadIdx.x == 0) x[blocks_share ? 0 : blockIdx.x] = blockIdx.x;
}

__global__ void shuffle_with_returned_lanes(float* x, int lanes) {
  if (static_cast<int>(threadIdx.x % 32) >= lanes) return;
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 1);
}

__global__ void shuffle_in_two_places(float* x, int lanes) {
  const float value = threadIdx.x;
  if (static_cast<int>(threadIdx.x % 32) < lanes) {
    x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, value * x[threadIdx.x], 2) + 1.0f;
  }
}

template <bool kWait>
__global__ void read_the_other_block(float* x) {
  FASTRL_DYNAMIC_SHARED(shared);
  auto* tile = reinterpret_cast<float*>(shared);
  tile[threadIdx.x] = threadIdx.x;
  cluster_sync();
  x[blockIdx.x * kThreads + threadIdx.x] = map_shared(tile, cluster_rank() ^ 1)[threadIdx.x];
  if (kWait) cluster_sync();
}

template <bool kReadFirst>
__global__ void reuse_what_the_other_block_reads(float* x) {
  FASTRL_DYNAMIC_SHARED(shared);
  auto* tile = reinterpret_cast<float*>(shared);
  tile[threadIdx.x] = threadIdx.x;
  cluster_sync();
  const float* other = map_shared(tile, cluster_rank() ^ 1);
  float value = 0.0f;
  if (kReadFirst) value = other[threadIdx.x];
  cluster_arrive_relaxed();
  if (!kReadFirst) value = other[threadIdx.x];
  cluster_wait();
  tile[threadIdx.x] = 0.0f;
  x[blockIdx.x * kThreads + threadIdx.x] = value;
}

template <bool kWait>
__global__ void arrive_twice(float*) {
  cluster_arrive_relaxed();
  if (kWait) cluster_wait();
  cluster_sync();
}

template <bool kWait>
__global__ void copy(float* x) {
  __shared__ Pack16 tile[kThreads];
  const auto* from = reinterpret_cast<const Pack16*>(x);
  if (threadIdx.x < 16) begin_copy(tile + threadIdx.x, from + threadIdx.x);
  if (kWait) wait_for_copies();
}

}  // namespace

void run_fault(const std::string& name, uintptr_t address, int64_t argument, int blocks) {
  auto* x = reinterpret_cast<float*>(address);
  const int n = static_cast<int>(argument);
  const auto launch = [&](auto kernel, auto... arguments) {
    FASTRL_LAUNCH(kernel, blocks, kThreads, 0, nullptr, x, arguments...);
  };
  const auto launch_pairs = [&](auto kernel) {
    FASTRL_LAUNCH_CLUSTER(kernel, 2, blocks, kThreads, kThreads * 4, nullptr, x);
  };
  if (name == "outside") launch(outside, argument);
  if (name == "misaligned") launch(misaligned, n);
  if (name == "reverse") n ? launch(reverse<false>) : launch(reverse<true>);
  if (name == "neighbour") n ? launch(neighbour<false>) : launch(neighbour<true>);
  if (name == "same_element") launch(same_element, n);
  if (name == "shuffle_with_returned_lanes") launch(shuffle_with_returned_lanes, n);
  if (name == "shuffle_in_two_places") launch(shuffle_in_two_places, n);
  if (name == "read_the_other_block") {
    n ? launch_pairs(read_the_other_block<false>) : launch_pairs(read_the_other_block<true>);
  }
  if (name == "reuse_what_the_other_block_reads") {
    n ? launch_pairs(reuse_what_the_other_block_reads<false>)
      : launch_pairs(reuse_what_the_other_block_reads<true>);
  }
  if (name == "copy") n ? launch(copy<false>) : launch(copy<true>);
  if (name == "arrive_twice")
    n ? launch_pairs(arrive_twice<false>) : launch_pairs(arrive_twice<true>);
}

}  // namespace fastrl::cuda
