// The machine that runs CUDA kernels on the host: every CUDA thread is a fiber. Threads are resumed
// in an order that changes from step to step, blocks run in a shuffled order, and shared memory
// begins as NaN, so that a missing barrier or a dependence between blocks shows in the results.
// Compiled with -fsanitize=thread, the kernels also report every access to memory: see checks.h.
//
// What it cannot show: real concurrency, and the numerics of the device's approximate functions.
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace host_cuda {

constexpr int kWarpSize = 32;

// What the kernels are told of the device; a test may choose.
extern size_t shared_limit;
extern bool has_clusters;

// Blocks of a cluster and bytes of dynamic shared memory of a block, of every launch.
extern std::set<std::pair<unsigned, size_t>> launches;

// Runs `kernel` (of so many bytes) by `run` in every thread of the grid.
void launch(void (*run)(const void*), const void* kernel, size_t bytes, dim3 grid,
            unsigned cluster_size, dim3 block, size_t shared_bytes);

// Of the running thread.
int lane();
unsigned cluster_rank();
unsigned cluster_size();
unsigned char* dynamic_shared();

void warp_barrier();
void block_barrier();
void cluster_barrier();
void cluster_arrive();  // cluster_barrier() in two steps
void cluster_wait();

// Replaces `value` by what lane `source` of the warp holds; unchanged if there is no such lane.
void exchange(void* value, size_t bytes, int source);

// What every lane of the warp holds, one after another.
void gather(const void* value, size_t bytes, void* values);

// Notes a copy of the running thread; it is made by whoever takes it, when the thread waits for it.
void begin_copy(void* to, const void* from);
bool next_copy(void*& to, const void*& from);  // false if none is left

// `p`, an address in the running block's dynamic shared memory, in that of another of its cluster.
void* map_shared(void* p, unsigned rank);

}  // namespace host_cuda
