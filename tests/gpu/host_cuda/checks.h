// What every access of a kernel to memory must fulfil: it lies within an array that the kernel was
// given or owns, is aligned as the device asks for, and is ordered by barriers after whatever other
// threads did there. Kernels compiled with -fsanitize=thread call in here; its runtime is not used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host_cuda {

// A thread of the launch, and how many barriers of each kind it has passed; the cluster's has two
// steps, and orders what comes before a thread's arrival ahead of what comes after another's wait.
struct Moment {
  uint32_t cluster = 0, block = 0, thread = 0;  // of the grid, of the cluster, of the block
  uint32_t cluster_arrivals = 0, cluster_waits = 0, block_barriers = 0, warp_barriers = 0;
};

struct Range {
  uintptr_t begin = 0, end = 0;

  bool contains(uintptr_t begin_, size_t bytes) const {
    return begin <= begin_ && begin_ + bytes <= end;
  }
};

// Maintained by machine.cpp.
struct Scene {
  const Moment* now = nullptr;  // of the running thread; null outside of kernels
  Range stack, parameters;
  std::vector<Range> static_shared;   // of all kernels
  std::vector<Range> dynamic_shared;  // of the blocks of the running cluster
};
extern Scene scene;

void report(const std::string& what, const void* where);

void begin_launch();  // what was done in earlier ones is ordered before it

// At the end of a thread: nobody may touch its block's shared memory who has not arrived since at a
// barrier of the cluster that the thread has waited for.
void block_ends(const Moment& moment);

void begin_shared(const Range& range);  // a block begins: nothing has been done there

// For tests: what the kernels declare as __shared__, as offsets in the module and bytes.
void set_static_shared(const std::vector<std::pair<uintptr_t, size_t>>& variables);

// An array of global memory that the next launches may touch; the first call after a
// launch begins a new list.
void allow(uintptr_t begin, size_t bytes);

// And what was found since the last call, with offsets of code in the module.
std::vector<std::pair<std::string, uintptr_t>> take_reports();

}  // namespace host_cuda
