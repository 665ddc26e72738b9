#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "checks.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

size_t shared_limit = 227 << 10;
bool has_clusters = true;
std::set<std::pair<unsigned, size_t>> launches;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kNan = 0xff;  // bytes that are a NaN in every format
constexpr char kUnawaited[] = "a copy that its thread did not wait for";
constexpr char kTurns[] = "cluster_arrive() and cluster_wait() do not take turns";
constexpr char kReturned[] = "a lane that has returned is waited for";

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  const void* site = nullptr;  // of the first to arrive

  void release_if_full() {
    if (arrived > 0 && arrived >= expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Warp {
  Barrier barrier;
  bool left = false;  // a lane has returned
  alignas(16) unsigned char slots[kWarpSize][16];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  Range shared;
};

struct Copy {
  void* to;
  const void* from;
  const void* site;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Moment moment;
  unsigned generation = 0;   // of the cluster's barrier, when the thread arrived there
  std::vector<Copy> copies;  // begun and not waited for
  bool done = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> cluster;
  Barrier cluster_barrier;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void (*run)(const void*) = nullptr;
  const void* kernel = nullptr;
  bool progress = false;
  std::mt19937 random{1234};
};

Machine machine;

Block& block() { return machine.cluster[machine.running->moment.block]; }
Warp& warp() { return block().warps[machine.running->moment.thread / kWarpSize]; }

void yield() { swapcontext(&machine.running->context, &machine.scheduler); }

// Returns what wait() takes.
unsigned arrive(Barrier& barrier, const void* site) {
  machine.progress = true;
  if (barrier.arrived == 0) barrier.site = site;
  if (barrier.site != site) report("threads wait for each other at two different places", site);
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  return generation;
}

void wait(const Barrier& barrier, unsigned generation) {
  while (barrier.generation == generation) yield();
}

void arrive_and_wait(Barrier& barrier, const void* site) { wait(barrier, arrive(barrier, site)); }

void arrive_at_cluster(const void* site) {
  Fiber& fiber = *machine.running;
  if (fiber.moment.cluster_arrivals != fiber.moment.cluster_waits) report(kTurns, site);
  ++fiber.moment.cluster_arrivals;
  fiber.generation = arrive(machine.cluster_barrier, site);
}

void wait_for_cluster(const void* site) {
  Fiber& fiber = *machine.running;
  if (fiber.moment.cluster_arrivals == fiber.moment.cluster_waits) return report(kTurns, site);
  wait(machine.cluster_barrier, fiber.generation);
  ++fiber.moment.cluster_waits;
}

void wait_for_all_lanes(const void* site) {
  if (warp().left) report(kReturned, site);
  arrive_and_wait(warp().barrier, site);
}

void finish() {
  Fiber& fiber = *machine.running;
  fiber.done = true;
  machine.progress = true;
  if (Barrier& b = warp().barrier; b.arrived > 0) report(kReturned, b.site);
  warp().left = true;
  if (fiber.moment.cluster_arrivals != fiber.moment.cluster_waits) report(kTurns, nullptr);
  for (const Copy& copy : fiber.copies) report(kUnawaited, copy.site);
  fiber.copies.clear();
  block_ends(fiber.moment);
  for (Barrier* b : {&warp().barrier, &block().barrier, &machine.cluster_barrier}) {
    --b->expected;
    b->release_if_full();
  }
}

void trampoline() {
  machine.run(machine.kernel);
  finish();
  yield();
}

void resume(Fiber& fiber, unsigned cluster_size) {
  machine.running = &fiber;
  blockIdx = dim3(fiber.moment.cluster * cluster_size + fiber.moment.block, 0, 0);
  threadIdx = dim3(fiber.moment.thread, 0, 0);
  const auto stack = reinterpret_cast<uintptr_t>(fiber.stack.get());
  scene.stack = {stack, stack + kStack};
  scene.now = &fiber.moment;
  swapcontext(&machine.scheduler, &fiber.context);
  scene.now = nullptr;
}

void start(Fiber& fiber, const Moment& moment) {
  fiber.moment = moment;
  fiber.done = false;
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, trampoline, 0);
}

void run_cluster(unsigned index, unsigned cluster_size, unsigned threads, size_t shared_bytes) {
  Machine& m = machine;
  m.cluster.assign(cluster_size, Block());
  m.cluster_barrier = Barrier{static_cast<int>(cluster_size * threads)};
  for (const Range& range : scene.static_shared) {
    std::memset(reinterpret_cast<void*>(range.begin), kNan, range.end - range.begin);
    begin_shared(range);
  }
  const size_t stride = (shared_bytes / 16 + 2) * 16;  // a gap behind each block's memory
  std::unique_ptr<unsigned char[]> shared(new unsigned char[cluster_size * stride]);
  std::memset(shared.get(), kNan, cluster_size * stride);
  scene.dynamic_shared.clear();
  m.fibers.resize(cluster_size * threads);
  for (unsigned rank = 0; rank < cluster_size; ++rank) {
    Block& block = m.cluster[rank];
    block.barrier.expected = static_cast<int>(threads);
    block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
    const auto begin = reinterpret_cast<uintptr_t>(shared.get() + rank * stride);
    block.shared = {begin, begin + shared_bytes};
    scene.dynamic_shared.push_back(block.shared);
    begin_shared(block.shared);
    for (unsigned t = 0; t < threads; ++t) {
      ++block.warps[t / kWarpSize].barrier.expected;
      start(m.fibers[rank * threads + t], {index, rank, t});
    }
  }
  std::vector<Fiber*> alive;
  for (Fiber& fiber : m.fibers) alive.push_back(&fiber);
  while (!alive.empty()) {
    m.progress = false;
    std::rotate(alive.begin(), alive.begin() + m.random() % alive.size(), alive.end());
    if (m.random() % 2) std::reverse(alive.begin(), alive.end());
    for (Fiber* fiber : alive) resume(*fiber, cluster_size);
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* f) { return f->done; }),
                alive.end());
    if (!m.progress) {
      std::fprintf(stderr, "host_cuda: deadlock: %zu threads wait for others\n", alive.size());
      std::abort();
    }
  }
}

}  // namespace

void launch(void (*run)(const void*), const void* kernel, size_t bytes, dim3 grid,
            unsigned cluster_size, dim3 block, size_t shared_bytes) {
  launches.emplace(cluster_size, shared_bytes);
  machine.run = run;
  machine.kernel = kernel;
  gridDim = grid;
  blockDim = block;
  const auto parameters = reinterpret_cast<uintptr_t>(kernel);
  scene.parameters = {parameters, parameters + bytes};
  begin_launch();
  std::vector<unsigned> clusters(grid.x / cluster_size);
  std::iota(clusters.begin(), clusters.end(), 0u);
  std::shuffle(clusters.begin(), clusters.end(), machine.random);
  for (unsigned cluster : clusters) run_cluster(cluster, cluster_size, block.x, shared_bytes);
}

int lane() { return static_cast<int>(machine.running->moment.thread % kWarpSize); }
unsigned cluster_rank() { return machine.running->moment.block; }
unsigned cluster_size() { return static_cast<unsigned>(machine.cluster.size()); }
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block().shared.begin); }

void warp_barrier() {
  wait_for_all_lanes(__builtin_return_address(0));
  ++machine.running->moment.warp_barriers;
}

void block_barrier() {
  arrive_and_wait(block().barrier, __builtin_return_address(0));
  ++machine.running->moment.block_barriers;
}

void cluster_barrier() {
  arrive_at_cluster(__builtin_return_address(0));
  wait_for_cluster(__builtin_return_address(0));
}

void cluster_arrive() { arrive_at_cluster(__builtin_return_address(0)); }
void cluster_wait() { wait_for_cluster(__builtin_return_address(0)); }

void exchange(void* value, size_t bytes, int source) {
  const void* site = __builtin_return_address(0);
  std::memcpy(warp().slots[lane()], value, bytes);
  wait_for_all_lanes(site);
  if (source >= 0 && source < kWarpSize) std::memcpy(value, warp().slots[source], bytes);
  wait_for_all_lanes(site);
}

void gather(const void* value, size_t bytes, void* values) {
  const void* site = __builtin_return_address(0);
  std::memcpy(warp().slots[lane()], value, bytes);
  wait_for_all_lanes(site);
  for (int i = 0; i < kWarpSize; ++i) {
    std::memcpy(static_cast<char*>(values) + i * bytes, warp().slots[i], bytes);
  }
  wait_for_all_lanes(site);
}

void begin_copy(void* to, const void* from) {
  machine.running->copies.push_back({to, from, __builtin_return_address(0)});
}

bool next_copy(void*& to, const void*& from) {
  std::vector<Copy>& copies = machine.running->copies;
  if (copies.empty()) return false;
  to = copies.back().to;
  from = copies.back().from;
  copies.pop_back();
  return true;
}

void* map_shared(void* p, unsigned rank) {
  return reinterpret_cast<void*>(machine.cluster[rank].shared.begin +
                                 (reinterpret_cast<uintptr_t>(p) - block().shared.begin));
}

}  // namespace host_cuda
