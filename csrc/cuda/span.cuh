// How a warp reads and writes up to 128 consecutive elements so that every lane holds four
// neighbours: sixteen bytes a lane where alignment allows it, else one by one through shared
// memory. Either way memory sees whole lines, and the same lane holds the same elements.
#pragma once

#include "reduce.cuh"
#include "types.cuh"

namespace fastrl::cuda {

constexpr int kItems = 4;  // consecutive elements of a lane
constexpr int kSpan = kItems * kWarp;

struct Span {
  int64_t begin;  // index of the warp's first element
  int size;       // elements of the warp, at most kSpan
  int offset;     // of the lane's first element, from begin
  int count;      // elements of the lane, at most kItems
  bool packed;    // every lane's offset is a multiple of kItems
  float* tile;    // kSpan floats of shared memory, the warp's own
};

// The 128 elements from `begin` of an array, or as many as there are before `end`.
__device__ inline Span span_between(int64_t begin, int64_t end, float* tile) {
  const int size = static_cast<int>(max(int64_t{0}, min(int64_t{kSpan}, end - begin)));
  const int offset = kItems * static_cast<int>(threadIdx.x % kWarp);
  return {begin, size, offset, max(0, min(kItems, size - offset)), true, tile};
}

template <int kBytes>
__device__ inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

// The lane's elements of p in x; 0 where it has none.
__device__ inline void load(const float* p, const Span& s, float* x) {
  p += s.begin;
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = 0.0f;
  if (s.packed && is_aligned<16>(p)) {
    if (s.count == kItems) {
      const auto pack = *reinterpret_cast<const Pack<float>*>(p + s.offset);
#pragma unroll
      for (int i = 0; i < kItems; ++i) x[i] = pack.values[i];
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i < s.count) x[i] = p[s.offset + i];
      }
    }
    return;
  }
  __syncwarp();  // another lane may still read the tile's last contents
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int j = static_cast<int>(threadIdx.x % kWarp) + k * kWarp;
    if (j < s.size) s.tile[j] = p[j];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i < s.count) x[i] = s.tile[s.offset + i];
  }
}

__device__ inline void store(float* p, const Span& s, const float* x) {
  p += s.begin;
  if (s.packed && is_aligned<16>(p)) {
    if (s.count == kItems) {
      Pack<float> pack;
#pragma unroll
      for (int i = 0; i < kItems; ++i) pack.values[i] = x[i];
      *reinterpret_cast<Pack<float>*>(p + s.offset) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i < s.count) p[s.offset + i] = x[i];
      }
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i < s.count) s.tile[s.offset + i] = x[i];
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int j = static_cast<int>(threadIdx.x % kWarp) + k * kWarp;
    if (j < s.size) p[j] = s.tile[j];
  }
}

// The flags of the lane's elements, a byte each that is not 0 if the flag is set, and 0 where it
// has none; null stands for flags all set.
__device__ inline uint32_t load_flags(const bool* p, const Span& s) {
  if (p == nullptr) return static_cast<uint32_t>((uint64_t{1} << 8 * s.count) - 1);
  p += s.begin + s.offset;
  if (s.packed && s.count == kItems && is_aligned<4>(p)) {
    return *reinterpret_cast<const uint32_t*>(p);
  }
  uint32_t flags[kItems] = {};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i < s.count) flags[i] = p[i];
  }
  return flags[0] | flags[1] << 8 | flags[2] << 16 | flags[3] << 24;
}

// Bit i is set if byte i is not 0. Apart from load_flags() because it waits for the bytes: all
// other loads should come before.
__device__ inline unsigned bits_of(uint32_t bytes) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) bits |= ((bytes >> 8 * i & 0xff) != 0 ? 1u : 0u) << i;
  return bits;
}

__device__ inline bool has(unsigned flags, int i) { return (flags >> i & 1u) != 0; }

}  // namespace fastrl::cuda
