// Sixteen bytes of a row at a time, wherever the row begins. No access leaves the row.
#pragma once

#include "types.cuh"

namespace fastrl::cuda {

// Bytes by which an address misses a 16-byte boundary; a multiple of the element's size.
template <typename T>
__device__ inline unsigned misalignment(const T* p) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) % 16);
}

// A pack as four words, so that it takes four registers whatever the size of its elements.
template <typename T>
struct alignas(16) Words {
  uint32_t w[4];

  static constexpr int kSize = Pack<T>::kSize;

  __device__ float get(int j) const {
    if constexpr (sizeof(T) == 4) {
      float x;
      memcpy(&x, &w[j], sizeof(x));
      return x;
    } else {
      return to_float(T{static_cast<uint16_t>(w[j / 2] >> 16 * (j % 2))});
    }
  }

  __device__ void set(int j, T x) {
    if constexpr (sizeof(T) == 4) {
      memcpy(&w[j], &x, sizeof(x));
    } else {
      const int shift = 16 * (j % 2);
      w[j / 2] = (w[j / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(x.bits) << shift;
    }
  }
};

// The larger of each two elements; NaN if either is. Halves are not widened.
template <typename T>
__device__ inline Words<T> max_of(const Words<T>& a, const Words<T>& b) {
  Words<T> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      out.w[i] = max_of_pairs<T>(a.w[i], b.w[i]);
    } else {
      out.set(i, max_or_nan(a.get(i), b.get(i)));
    }
  }
  return out;
}

template <typename T>
__device__ inline Words<T> load_aligned(const T* p) {
  return *reinterpret_cast<const Words<T>*>(p);
}

template <typename T>
__device__ inline void store_aligned(T* p, const Words<T>& words) {
  *reinterpret_cast<Words<T>*>(p) = words;
}

// The pack at an address that misses a boundary by `shift` bytes, from the two aligned ones it
// straddles. Neighbouring threads read the same ones, so the second access hits the L1 cache.
template <typename T>
__device__ inline Words<T> load_straddling(const T* p, unsigned shift) {
  const auto* aligned = reinterpret_cast<const Words<T>*>(reinterpret_cast<const char*>(p) - shift);
  const Words<T> low = aligned[0], high = aligned[1];
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = low.w[i], w[4 + i] = high.w[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  Words<T> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.w[i] = shift & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  return out;
}

// Elements begin .. begin + kSize - 1 of the `count` that start at `x`; `fill` beyond the end.
template <bool kAligned = false, typename T>
__device__ inline Words<T> load_pack(const T* x, int64_t begin, int64_t count, T fill) {
  constexpr int kSize = Pack<T>::kSize;
  const unsigned shift = kAligned ? 0 : misalignment(x + begin);
  if (shift == 0 && begin + kSize <= count) return load_aligned(x + begin);
  if (shift != 0 && begin >= kSize && begin + 2 * kSize <= count) {
    return load_straddling(x + begin, shift);
  }
  Words<T> words{};
#pragma unroll
  for (int j = 0; j < kSize; ++j) words.set(j, begin + j < count ? x[begin + j] : fill);
  return words;
}

// Elements 0 .. kSize - 1 from p on.
template <typename T>
__device__ inline void store_pack(T* p, const Words<T>& words) {
  if (misalignment(p) == 0) {
    store_aligned(p, words);
  } else {
    Pack<T> pack;
    memcpy(&pack, &words, sizeof(pack));
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) p[j] = pack.values[j];
  }
}

// How a block writes `count` elements from `out` on: whole aligned packs, and at most kSize - 1
// single elements on either side of them, one for each of the first threads.
template <typename T>
struct PackSpan {
  int64_t head;  // elements before the first pack
  int64_t packs;
  int64_t single;  // the calling thread's single element; -1 if it has none

  __device__ PackSpan(const T* out, int64_t count) {
    constexpr int kSize = Pack<T>::kSize;
    head = (16 - misalignment(out)) % 16 / sizeof(T);
    if (head > count) head = count;
    packs = (count - head) / kSize;
    const int64_t tail = count - head - packs * kSize;
    const int64_t thread = threadIdx.x;
    single = thread < head ? thread : thread < head + tail ? packs * kSize + thread : -1;
  }
};

template <typename T>
__device__ inline void zero_span(T* out, int64_t count) {
  const PackSpan<T> span(out, count);
  if (span.single >= 0) out[span.single] = T{};
  for (int64_t i = threadIdx.x; i < span.packs; i += blockDim.x) {
    store_aligned(out + span.head + i * Pack<T>::kSize, Words<T>{});
  }
}

}  // namespace fastrl::cuda
