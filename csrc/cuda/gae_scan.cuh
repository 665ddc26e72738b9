// Generalised advantage estimation as a scan from right to left. What a kept step needs of its
// right is one number, carry = gamma * next value + gamma * lambda * next advantage:
//
//   advantage = (reward - value) + carry;   carry' = gamma * value + gamma * lambda * advantage
//
// so a stretch of a row is an affine map of the carry, and maps compose. A dropped step is the
// identity; after a done the carry is 0.
#pragma once

#include "span.cuh"

namespace fastrl::cuda {

// carry -> slope * carry + offset; a negative slope marks a stretch with a done in it, which lets
// nothing pass, NaN included.
struct Affine {
  float slope, offset;
};

constexpr float kCut = -1.0f;

__host__ __device__ inline Affine identity() { return {1.0f, 0.0f}; }

__host__ __device__ inline float apply(Affine map, float carry) {
  return map.slope < 0.0f ? map.offset : map.slope * carry + map.offset;
}

__host__ __device__ inline Affine compose(Affine left, Affine right) {
  if (left.slope < 0.0f) return left;
  return {right.slope < 0.0f ? kCut : left.slope * right.slope, apply(left, right.offset)};
}

struct Discount {
  float gamma, decay;  // decay = gamma * lambda
};

// The steps of one lane.
struct Steps {
  float reward[kItems], value[kItems];
  unsigned kept, done;  // bit i belongs to step i
};

__host__ __device__ inline Affine map_of(const Steps& s, Discount d) {
  Affine map = identity();
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const Affine step{(s.done >> i & 1u) != 0 ? kCut : d.decay,
                      d.gamma * s.value[i] + d.decay * (s.reward[i] - s.value[i])};
    if ((s.kept >> i & 1u) != 0) map = compose(step, map);
  }
  return map;
}

// Advantages of the lane's kept steps, 0 for dropped ones, where `carry` comes from its right.
__host__ __device__ inline void walk(const Steps& s, Discount d, float carry, float* advantages) {
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    advantages[i] = 0.0f;
    if ((s.kept >> i & 1u) == 0) continue;
    if ((s.done >> i & 1u) != 0) carry = 0.0f;
    advantages[i] = (s.reward[i] - s.value[i]) + carry;
    carry = d.gamma * s.value[i] + d.decay * advantages[i];
  }
}

// The composition of the maps of this lane and of those to its right in its group of `lanes`
// neighbours (a power of two).
__device__ inline Affine suffix_scan(Affine map, int lanes) {
  const int lane = threadIdx.x & (lanes - 1);
  for (int step = 1; step < lanes; step *= 2) {
    const Affine right{__shfl_down_sync(kFullMask, map.slope, step),
                       __shfl_down_sync(kFullMask, map.offset, step)};
    if (lane + step < lanes) map = compose(map, right);
  }
  return map;
}

// What enters the lane from its right, given its suffix and what enters its group.
__device__ inline float entering(Affine suffix, int lanes, float carry) {
  const Affine right{__shfl_down_sync(kFullMask, suffix.slope, 1),
                     __shfl_down_sync(kFullMask, suffix.offset, 1)};
  const int lane = threadIdx.x & (lanes - 1);
  return lane + 1 < lanes ? apply(right, carry) : carry;
}

// Rows of at most kSpan steps: `lanes` neighbours share a row, 32 / lanes rows share a warp.
// Longer ones: a block walks over a row in chunks of blockDim.x * kItems steps.
constexpr int kShortThreads = 256;
constexpr int kLongThreads = 512;
constexpr int kMaxWarps = kLongThreads / kWarp;

inline int lanes_of_short_row(int64_t steps) {
  int lanes = 1;
  while (lanes * kItems < steps) lanes *= 2;
  return lanes;
}

inline int64_t blocks_of_short_rows(int64_t rows, int lanes) {
  return ceil_div<int64_t>(rows, kShortThreads / lanes);
}

// As few chunks as possible, of equal size.
inline int threads_of_long_row(int64_t steps) {
  const int64_t chunks = ceil_div<int64_t>(steps, kLongThreads * kItems);
  return kWarp * static_cast<int>(ceil_div<int64_t>(steps, chunks * kSpan));
}

// The row of a lane in a kernel of short rows, and the warp's span over its rows.
struct ShortRow {
  int64_t row;
  bool exists;
  Span span;
};

__device__ inline ShortRow short_row(int64_t rows, int64_t steps, int lanes, float* tile) {
  const unsigned lane = threadIdx.x % kWarp;
  const int group = lane / static_cast<unsigned>(lanes);
  const int64_t warp = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  const int64_t first = warp * (kWarp / lanes), left = rows - first;
  const int here = static_cast<int>(max(int64_t{0}, min(int64_t{kWarp} / lanes, left)));
  const int length = static_cast<int>(steps), at = (lane & (lanes - 1)) * kItems;
  const bool exists = group < here;
  const int count = exists ? max(0, min(kItems, length - at)) : 0;
  const bool packed = length % kItems == 0;
  return {first + group, exists,
          Span{first * steps, here * length, group * length + at, count, packed, tile}};
}

// What the warps of a block tell each other about one chunk of a row. Two of them take turns, so
// that one barrier a chunk is enough.
struct ChunkTotals {
  Affine map[kMaxWarps];
  int kept[kMaxWarps];  // whether the warp keeps a step
};

struct Entry {
  float carry;      // what enters the lane
  bool kept_right;  // whether a step to the right of the lane is kept
};

// The block's scan over one chunk. `state` enters it on the right and becomes what leaves it.
__device__ inline Entry chunk_scan(Affine map, unsigned kept, ChunkTotals& totals, Entry& state) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Affine suffix = suffix_scan(map, kWarp);
  const unsigned lanes_kept = __ballot_sync(kFullMask, kept != 0);
  if (lane == 0) {
    totals.map[warp] = suffix;
    totals.kept[warp] = lanes_kept != 0;
  }
  __syncthreads();
  const bool used = lane < warps;
  const Affine of_warps = suffix_scan(used ? totals.map[lane] : identity(), kWarp);
  const unsigned warps_kept = __ballot_sync(kFullMask, used && totals.kept[lane] != 0);
  const Affine right{__shfl_sync(kFullMask, of_warps.slope, warp + 1),  // kMaxWarps < kWarp
                     __shfl_sync(kFullMask, of_warps.offset, warp + 1)};
  const Affine all{__shfl_sync(kFullMask, of_warps.slope, 0),
                   __shfl_sync(kFullMask, of_warps.offset, 0)};
  const Entry entry{
      entering(suffix, kWarp, apply(right, state.carry)),
      state.kept_right || warps_kept >> warp >> 1 != 0 || lanes_kept >> lane >> 1 != 0};
  state = {apply(all, state.carry), state.kept_right || warps_kept != 0};
  return entry;
}

}  // namespace fastrl::cuda
