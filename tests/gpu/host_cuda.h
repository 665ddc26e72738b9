// CUDA on the host, for tests without a GPU: the kernels of csrc/cuda, compiled as C++, run with
// every CUDA thread as a fiber. Threads are resumed in an order that changes from step to step and
// blocks run in a shuffled order, so that a missing barrier or a dependence between blocks shows.
// What it cannot show: real concurrency, alignment faults of vector accesses, numerics of the
// device's approximate functions.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __shared__ static  // blocks run one after another; clusters must use dynamic shared memory

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace host_cuda {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 64 << 10;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;

  void release_if_full() {
    if (arrived > 0 && arrived >= expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[kWarpSize][16];
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> cluster;
  Barrier cluster_barrier;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  bool progress = false;
  std::mt19937 random{1234};
};

inline Machine machine;

// What the kernels are told of the device; host_module.cpp lets a test choose.
inline size_t shared_limit = 227 << 10;
inline bool has_clusters = true;

inline Block& block() { return *machine.running->block; }
inline int lane() { return machine.running->thread % kWarpSize; }
inline Warp& warp() { return block().warps[machine.running->thread / kWarpSize]; }

inline void yield() { swapcontext(&machine.running->context, &machine.scheduler); }

inline void wait(Barrier& barrier) {
  machine.progress = true;
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  while (barrier.generation == generation) yield();
}

// What lane `source` (of the same warp) holds in `value`.
template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 16, "shuffles move at most 16 bytes here");
  std::memcpy(warp().slots[lane()], &value, sizeof(T));
  wait(warp().barrier);
  if (source >= 0 && source < kWarpSize) std::memcpy(&value, warp().slots[source], sizeof(T));
  wait(warp().barrier);
  return value;
}

// What every lane of the warp holds in `value`.
template <typename T>
std::array<T, kWarpSize> gather(const T& value) {
  static_assert(sizeof(T) <= 16, "lanes hand over at most 16 bytes here");
  std::array<T, kWarpSize> values;
  std::memcpy(warp().slots[lane()], &value, sizeof(T));
  wait(warp().barrier);
  for (int i = 0; i < kWarpSize; ++i) std::memcpy(&values[i], warp().slots[i], sizeof(T));
  wait(warp().barrier);
  return values;
}

// `p`, an address in the running block's shared memory, in that of block `rank` of its cluster.
template <typename T>
T* map_shared(T* p, unsigned rank) {
  const auto offset = reinterpret_cast<unsigned char*>(p) - block().shared;
  return reinterpret_cast<T*>(machine.cluster[rank].shared + offset);
}

inline void finish() {
  Fiber& fiber = *machine.running;
  fiber.done = true;
  machine.progress = true;
  for (Barrier* b : {&warp().barrier, &block().barrier, &machine.cluster_barrier}) {
    --b->expected;
    b->release_if_full();
  }
}

inline void trampoline() {
  machine.kernel();
  finish();
  yield();
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  blockIdx = fiber.block->index;
  threadIdx = dim3(fiber.thread, 0, 0);
  swapcontext(&machine.scheduler, &fiber.context);
}

inline void run_cluster(unsigned first_block, unsigned cluster_size, unsigned threads,
                        size_t shared_bytes) {
  Machine& m = machine;
  m.cluster.assign(cluster_size, Block());
  m.cluster_barrier = Barrier{static_cast<int>(cluster_size * threads)};
  // Whatever is in shared memory at the start must not matter.
  std::vector<double> shared(cluster_size * (shared_bytes / 16 + 1) * 2, std::nan(""));
  m.fibers.resize(cluster_size * threads);
  for (unsigned rank = 0; rank < cluster_size; ++rank) {
    Block& block = m.cluster[rank];
    block.index = dim3(first_block + rank, 0, 0);
    block.rank = rank;
    block.barrier.expected = static_cast<int>(threads);
    block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
    unsigned char* base = reinterpret_cast<unsigned char*>(shared.data());
    base += (16 - reinterpret_cast<uintptr_t>(base) % 16) % 16;
    block.shared = base + rank * (shared_bytes / 16 + 1) * 16;
    for (unsigned t = 0; t < threads; ++t) {
      ++block.warps[t / kWarpSize].barrier.expected;
      Fiber& fiber = m.fibers[rank * threads + t];
      fiber.block = &block;
      fiber.thread = t;
      fiber.done = false;
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, trampoline, 0);
    }
  }
  std::vector<Fiber*> alive;
  for (Fiber& fiber : m.fibers) alive.push_back(&fiber);
  while (!alive.empty()) {
    m.progress = false;
    std::rotate(alive.begin(), alive.begin() + m.random() % alive.size(), alive.end());
    if (m.random() % 2) std::reverse(alive.begin(), alive.end());
    for (Fiber* fiber : alive) resume(*fiber);
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* f) { return f->done; }),
                alive.end());
    if (!m.progress) {
      std::fprintf(stderr, "host_cuda: deadlock: %zu threads wait for others\n", alive.size());
      std::abort();
    }
  }
}

template <typename Kernel>
void launch(Kernel kernel, dim3 grid, unsigned cluster_size, dim3 block, size_t shared_bytes) {
  machine.kernel = kernel;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> clusters(grid.x / cluster_size);
  std::iota(clusters.begin(), clusters.end(), 0u);
  std::shuffle(clusters.begin(), clusters.end(), machine.random);
  for (unsigned cluster : clusters) {
    run_cluster(cluster * cluster_size, cluster_size, block.x, shared_bytes);
  }
}

}  // namespace host_cuda

#define FASTRL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), host_cuda::launch([=] { (kernel)(__VA_ARGS__); }, grid, 1, block, shared_bytes))
#define FASTRL_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                                     \
   host_cuda::launch([=] { (kernel)(__VA_ARGS__); }, grid, cluster, block, shared_bytes))
#define FASTRL_DYNAMIC_SHARED(name) unsigned char* name = host_cuda::block().shared

inline void __syncthreads() { host_cuda::wait(host_cuda::block().barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { host_cuda::wait(host_cuda::warp().barrier); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return host_cuda::exchange(value, source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::exchange(value, host_cuda::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  return host_cuda::exchange(value, host_cuda::lane() - static_cast<int>(delta));
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return host_cuda::exchange(value, host_cuda::lane() + static_cast<int>(delta));
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto votes = host_cuda::gather(predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(votes[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int_as_float(int x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
