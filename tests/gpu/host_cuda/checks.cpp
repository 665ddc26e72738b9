#include "checks.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

// The ends of this module in memory: its constants and variables.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

namespace host_cuda {

Scene scene;

namespace {

constexpr size_t kMaxReports = 20;

enum Access { kRead, kWrite };

struct Cell {  // a byte
  Moment written, read[2];
  bool is_written = false;
  int readers = 0;  // of different threads
};

constexpr size_t kPage = 256;
using Page = Cell[kPage];

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page = 0;
Cell* last_cells = nullptr;
std::vector<Range> arrays;  // of global memory
bool launched = false;      // since the last array was allowed
std::vector<uint32_t>
    remote_accesses;      // to each block's shared memory: the cluster barrier that ends them
std::vector<bool> ended;  // blocks of the running cluster with a thread that returned
std::vector<std::pair<std::string, uintptr_t>> reports;

Cell& cell(uintptr_t address) {
  const uintptr_t page = address / kPage;
  if (last_cells == nullptr || page != last_page) {
    auto& cells = pages[page];
    if (!cells) cells.reset(new Page[1]);
    last_page = page;
    last_cells = *cells;
  }
  return last_cells[address % kPage];
}

bool same_thread(const Moment& a, const Moment& b) {
  return a.cluster == b.cluster && a.block == b.block && a.thread == b.thread;
}

// Whether a barrier lies between what happened then and now.
bool ordered(const Moment& then, const Moment& now) {
  if (then.cluster != now.cluster) return false;
  if (now.cluster_waits > then.cluster_arrivals) return true;
  if (then.block != now.block) return false;
  if (then.thread == now.thread || now.block_barriers > then.block_barriers) return true;
  return then.thread / 32 == now.thread / 32 && now.warp_barriers > then.warp_barriers;
}

// Whether some earlier access to the byte may happen at the same time; notes the new one.
bool races(Cell& c, Access access, const Moment& now) {
  bool race = c.is_written && !ordered(c.written, now);
  if (access == kWrite) {
    for (int i = 0; i < c.readers; ++i) race = race || !ordered(c.read[i], now);
    c.written = now;
    c.is_written = true;
    c.readers = 0;
    return race;
  }
  for (int i = 0; i < c.readers; ++i) {
    if (same_thread(c.read[i], now)) {
      c.read[i] = now;
      return race;
    }
  }
  c.read[c.readers < 2 ? c.readers++ : now.thread % 2] = now;
  return race;
}

// The array of global memory or the shared memory that holds the bytes; null if there is none.
const Range* tracked_range(uintptr_t address, size_t bytes, const void* where) {
  for (const Range& range : scene.static_shared) {
    if (range.contains(address, bytes)) return &range;
  }
  for (size_t block = 0; block < scene.dynamic_shared.size(); ++block) {
    const Range& range = scene.dynamic_shared[block];
    if (!range.contains(address, bytes)) continue;
    if (block != scene.now->block) {
      if (ended[block]) report("shared memory of a block that has ended", where);
      remote_accesses[block] = std::max(remote_accesses[block], scene.now->cluster_arrivals + 1);
    }
    return &range;
  }
  for (const Range& range : arrays) {
    if (range.contains(address, bytes)) return &range;
  }
  return nullptr;
}

void check(Access access, const void* p, size_t bytes, const void* where) {
  if (scene.now == nullptr || bytes == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (scene.stack.contains(address, bytes)) return;
  if (scene.parameters.contains(address, bytes) && access == kRead) return;
  if (tracked_range(address, bytes, where) == nullptr) {
    const Range module{reinterpret_cast<uintptr_t>(&__ehdr_start),
                       reinterpret_cast<uintptr_t>(&_end)};
    if (module.contains(address, bytes) && access == kRead) return;
    const char* what = access == kRead ? "read" : "write";
    report(std::string(what) + " of " + std::to_string(bytes) + " bytes outside of every array",
           where);
    return;
  }
  bool race = false;
  for (size_t i = 0; i < bytes; ++i) race = races(cell(address + i), access, *scene.now) || race;
  if (race) {
    report(access == kRead ? "read of what another thread may be writing"
                           : "write of what another thread may be reading or writing",
           where);
  }
}

}  // namespace

void report(const std::string& what, const void* where) {
  if (reports.size() >= kMaxReports) return;
  const auto code = reinterpret_cast<uintptr_t>(where);
  const auto base = reinterpret_cast<uintptr_t>(&__ehdr_start);
  reports.emplace_back(what, code > base ? code - base - 1 : 0);
}

void begin_launch() {
  launched = true;
  pages.clear();
  last_cells = nullptr;
}

void begin_shared(const Range& range) {
  for (uintptr_t page = range.begin / kPage; page <= range.end / kPage; ++page) {
    const auto found = pages.find(page);
    if (found == pages.end()) continue;
    for (size_t i = 0; i < kPage; ++i) {
      const uintptr_t address = page * kPage + i;
      if (range.contains(address, 1)) (*found->second)[i] = Cell();
    }
  }
  remote_accesses.assign(std::max(scene.dynamic_shared.size(), size_t{1}), 0);
  ended.assign(remote_accesses.size(), false);
}

void block_ends(const Moment& moment) {
  if (moment.block >= ended.size()) return;
  ended[moment.block] = true;
  if (remote_accesses[moment.block] > moment.cluster_waits) {
    report("a block ends while others may be reading its shared memory", nullptr);
  }
}

void set_static_shared(const std::vector<std::pair<uintptr_t, size_t>>& variables) {
  scene.static_shared.clear();
  for (const auto& [offset, bytes] : variables) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(&__ehdr_start) + offset;
    scene.static_shared.push_back({begin, begin + bytes});
  }
}

void allow(uintptr_t begin, size_t bytes) {
  if (launched) arrays.clear();
  launched = false;
  arrays.push_back({begin, begin + bytes});
}

std::vector<std::pair<std::string, uintptr_t>> take_reports() {
  auto taken = std::move(reports);
  reports.clear();
  return taken;
}

}  // namespace host_cuda

// What GCC calls in code compiled with -fsanitize=thread.
using host_cuda::check;
#define HERE __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define CHECKED(bytes)                                                                    \
  void __tsan_read##bytes(void* p) { check(host_cuda::kRead, p, bytes, HERE); }           \
  void __tsan_write##bytes(void* p) { check(host_cuda::kWrite, p, bytes, HERE); }         \
  void __tsan_unaligned_read##bytes(void* p) { check(host_cuda::kRead, p, bytes, HERE); } \
  void __tsan_unaligned_write##bytes(void* p) { check(host_cuda::kWrite, p, bytes, HERE); }
CHECKED(1)
CHECKED(2)
CHECKED(4)
CHECKED(8)
CHECKED(16)

void __tsan_read_range(void* p, unsigned long bytes) { check(host_cuda::kRead, p, bytes, HERE); }
void __tsan_write_range(void* p, unsigned long bytes) { check(host_cuda::kWrite, p, bytes, HERE); }

// And with -fsanitize=alignment: the address of an access to a type that must not lie there.
void __ubsan_handle_type_mismatch_v1(const void*, const void*) {
  host_cuda::report("an address that is not aligned for its type", HERE);
}

}  // extern "C"
