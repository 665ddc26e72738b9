// One row of softmax(logits): the statistics that ../cpu/softmax_row.h defines.
//
// The order of every sum is fixed by the number of columns and the element type alone. A warp takes
// a tile of 2 KiB at a time; tile t belongs to slot t % 8; a slot adds its tiles in order, and the
// slots are added in order. So a row's bits are the same whichever kernel computes them (a block
// whose warps are the slots, a warp for each tile, a cluster of blocks), in any batch, and wherever
// the row lies in memory.
//
// The target is kept out of the sums and added at the end: its odds give a log-prob that is exact
// near 0.
#pragma once

#include "../rows.h"
#include "packs.cuh"
#include "reduce.cuh"

namespace fastrl::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^d is 0 below; the bound keeps (-inf) * 0 out of weighted sums.
constexpr float kLowestLog2 = -150.0f;

constexpr int kSlots = 8;  // and warps of a block
constexpr int kRowThreads = kSlots * kWarp;
constexpr int kTilePacks = 4;  // of each lane

template <typename T>
constexpr int kTile = kTilePacks * kWarp * Pack<T>::kSize;  // elements

template <typename T>
__host__ __device__ constexpr int tiles_of(int64_t vocab) {
  return static_cast<int>(ceil_div<int64_t>(vocab, kTile<T>));
}

template <typename T>
__host__ __device__ constexpr int pieces_of(int64_t vocab) {  // of a tile for each slot
  return ceil_div(tiles_of<T>(vocab), kSlots);
}

__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

template <typename T>
__device__ inline T* row_pointer(const Rows& rows, int64_t index) {
  return static_cast<T*>(rows.data) + index / rows.inner * rows.outer_stride +
         index % rows.inner * rows.inner_stride;
}

// x = softcap * tanh(logit / softcap) if softcap > 0, else the logit; -inf stays -inf either way,
// so that banned tokens stay banned.
struct LogitMap {
  float inv_temperature;
  float softcap;

  __device__ float scale() const { return inv_temperature * kLog2e; }

  template <bool kSoftcap>
  __device__ float capped(float logit) const {
    if (!kSoftcap || logit == -INFINITY) return logit;
    const float e = exp2_approx(logit * (2.0f * kLog2e / softcap));
    return softcap - __fdividef(2.0f * softcap, e + 1.0f);  // tanh(y) = 1 - 2 / (e^2y + 1)
  }
};

// Of some columns of a row, with d_v = (x_v - max) / temperature * log2(e).
struct alignas(16) Partial {
  float max;
  float sum;       // of 2^d_v
  float weighted;  // of 2^d_v d_v
  bool beats;      // one of them comes before the target as the arg max; see beats_target
};

__device__ inline Partial no_columns() { return {-INFINITY, 0.0f, 0.0f, false}; }

__device__ inline Partial combine(const Partial& a, const Partial& b, float scale) {
  Partial total{fmaxf(a.max, b.max), 0.0f, 0.0f, a.beats || b.beats};
  auto add = [&](const Partial& part) {
    const float shift =
        fmaxf((part.max - total.max) * scale, kLowestLog2);  // also if both are -inf
    const float rescale = exp2_approx(shift);
    total.sum = fmaf(part.sum, rescale, total.sum);
    total.weighted = fmaf(fmaf(shift, part.sum, part.weighted), rescale, total.weighted);
  };
  add(a);
  add(b);
  return total;
}

__device__ inline Partial combine_slots(const Partial* slots, float scale) {
  Partial total = slots[0];
  for (int slot = 1; slot < kSlots; ++slot) total = combine(total, slots[slot], scale);
  return total;
}

// The calling lane's packs of a tile, -inf beyond the row's end. Pack i of lane l is the tile's
// (32 i + l)-th, whatever the row's alignment; kAligned promises a row that begins at a boundary.
template <bool kAligned = false, typename T>
__device__ inline void load_tile(const T* row, int tile, int64_t vocab,
                                 Words<T> (&packs)[kTilePacks]) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t begin = int64_t{tile} * kTile<T>;
  const int64_t first = begin + lane_index() * kSize;
  const unsigned shift = kAligned ? 0 : misalignment(row);
  if (shift == 0 && begin + kTile<T> <= vocab) {
#pragma unroll
    for (int i = 0; i < kTilePacks; ++i) packs[i] = load_aligned(row + first + i * kWarp * kSize);
  } else if (shift != 0 && begin > 0 && begin + kTile<T> + kSize <= vocab) {
#pragma unroll
    for (int i = 0; i < kTilePacks; ++i) {
      packs[i] = load_straddling(row + first + i * kWarp * kSize, shift);
    }
  } else {
    const T fill = from_float<T>(-INFINITY);
#pragma unroll
    for (int i = 0; i < kTilePacks; ++i) {
      packs[i] = load_pack<kAligned>(row, first + i * kWarp * kSize, vocab, fill);
    }
  }
}

// The token of a row that is asked for.
struct Target {
  int64_t id;
  float logit;
  bool compared;  // with the other logits: whether it is the arg max is asked for

  // Soft-capped; NaN if it is outside the vocabulary, which makes the row NaN.
  template <bool kSoftcap>
  __device__ float capped(int64_t vocab, const LogitMap& map) const {
    return id < vocab ? map.capped<kSoftcap>(logit) : NAN;
  }
};

// An id outside the vocabulary is taken for a column behind all others with a logit below them.
template <typename T>
__device__ inline Target read_target(const T* row, int64_t token_id, int64_t vocab, bool compared) {
  const bool inside = token_id >= 0 && token_id < vocab;
  return {inside ? token_id : vocab, inside ? to_float(row[token_id]) : -INFINITY, compared};
}

// Whether a column of a warp's tile, whose largest logit is `top`, comes before the target as the
// arg max: the largest logit does, the first of equals, and NaN is above all numbers. `place` is
// the target's relative to the tile. Scale, soft cap and temperature keep the order of logits, so
// they are compared as they are.
template <typename T>
__device__ inline bool beats_target(const Words<T> (&packs)[kTilePacks], float top,
                                    const Target& target, int64_t place) {
  constexpr int kSize = Pack<T>::kSize;
  if (!target.compared || top < target.logit) return false;
  if (top > target.logit) return true;
  const float logit = target.logit;
  int beats = 0;  // equals, or a NaN
#pragma unroll
  for (int i = 0; i < kTilePacks; ++i) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float x = packs[i].get(j);
      const bool before = (i * kWarp + lane_index()) * kSize + j < place;
      const bool equal = x == logit || (x != x && logit != logit);
      beats |= equal ? before : x != x;
    }
  }
  return warp_reduce(beats, [](int a, int b) { return a | b; }) != 0;
}

// Of tile `tile`, which a warp holds, without the target, in every lane.
template <bool kSoftcap, bool kMean, typename T>
__device__ inline Partial tile_partial(Words<T> (&packs)[kTilePacks], int tile,
                                       const Target& target, const LogitMap& map) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t place = target.id - int64_t{tile} * kTile<T>;  // the target's in the tile, if there
  if (place >= 0 && place < kTile<T>) {
#pragma unroll
    for (int i = 0; i < kTilePacks; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (place == (i * kWarp + lane_index()) * kSize + j) {
          packs[i].set(j, from_float<T>(-INFINITY));
        }
      }
    }
  }
  Words<T> largest = packs[0];
#pragma unroll
  for (int i = 1; i < kTilePacks; ++i) largest = max_of(largest, packs[i]);
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < kSize; ++j) top = max_or_nan(top, largest.get(j));
  top = warp_reduce(top, [](float a, float b) { return max_or_nan(a, b); });
  Partial part = no_columns();
  part.beats = beats_target(packs, top, target, place);
  part.max = map.capped<kSoftcap>(top);
  const float base = part.max == -INFINITY ? 0.0f : part.max;  // a tile of -inf adds 2^-inf = 0
  const float scale = map.scale();
  float sum[2] = {0.0f, 0.0f}, weighted[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kTilePacks; ++i) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float d = (map.capped<kSoftcap>(packs[i].get(j)) - base) * scale;
      const float e = exp2_approx(d);
      sum[j % 2] += e;
      if (kMean) weighted[j % 2] = fmaf(e, fmaxf(d, kLowestLog2), weighted[j % 2]);
    }
  }
  auto add = [](float a, float b) { return a + b; };
  part.sum = warp_reduce(sum[0] + sum[1], add);
  if (kMean) part.weighted = warp_reduce(weighted[0] + weighted[1], add);
  return part;
}

// The calling warp's slot of a row.
template <bool kSoftcap, bool kMean, typename T>
__device__ inline Partial slot_partial(const T* row, int64_t vocab, const Target& target,
                                       const LogitMap& map) {
  Partial total = no_columns();
  const int tiles = tiles_of<T>(vocab);
#pragma unroll 1
  for (int tile = warp_index(); tile < tiles; tile += kSlots) {
    Words<T> packs[kTilePacks];
    load_tile(row, tile, vocab, packs);
    const Partial part = tile_partial<kSoftcap, kMean>(packs, tile, target, map);
    total = combine(total, part, map.scale());
  }
  return total;
}

// What is known of a row once it has been read. offset and log_sum are the CPU kernels' RowStats.
struct RowResult {
  float offset;
  float log_sum;
  float entropy;
  float logprob;
  bool top1;
};

// `rest`: all columns but the target's; `target`: its logit, soft-capped.
__device__ inline RowResult finish_row(const Partial& rest, float target, const LogitMap& map) {
  Partial own = no_columns();
  if (target != -INFINITY) {
    own.max = target;
    own.sum = target < INFINITY ? 1.0f : NAN;
  }
  const Partial total = combine(rest, own, map.scale());
  const bool top1 = !rest.beats;
  if (total.sum != total.sum) return {0.0f, NAN, NAN, NAN, top1};
  if (total.max == -INFINITY) return {-INFINITY, 0.0f, 0.0f, -INFINITY, top1};
  RowResult row;
  row.top1 = top1;
  row.offset = total.max;
  row.log_sum = log2f(total.sum);
  row.entropy = (row.log_sum - total.weighted / total.sum) * kLn2;
  // With odds = (1 - p) / p, log p = -log(1 + odds): exact near p = 1, never above 0.
  const float log_odds = fmaf(rest.max - target, map.inv_temperature, logf(rest.sum));
  row.logprob =
      log_odds > 0.0f ? -(log_odds + log1pf(expf(-log_odds))) : 0.0f - log1pf(expf(log_odds));
  return row;
}

// Where a row's results go; all but logprobs may be null.
struct RowOutputs {
  float* logprobs;
  float* row_stats;
  float* entropy;
  bool* top1;

  __device__ void write(int64_t row, const RowResult& result) const {
    logprobs[row] = result.logprob;
    if (entropy != nullptr) entropy[row] = result.entropy;
    if (top1 != nullptr) top1[row] = result.top1;
    if (row_stats != nullptr) {
      row_stats[2 * row] = result.offset;
      row_stats[2 * row + 1] = result.log_sum;
    }
  }
};

}  // namespace fastrl::cuda
