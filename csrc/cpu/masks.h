// Masks as vector conditions, and work split among threads. A dropped element is replaced by
// selection, never by multiplication: it may hold NaN.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastrl::cpu::FASTRL_ISA {

// -1 where the flag is set, 0 elsewhere; usable as `flags ? a : b`.
inline vint load_flags(const bool* p) {
#if defined(__AVX512F__)
  return bit_cast<vint>(
             _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) != 0;
#elif defined(__AVX2__)
  return bit_cast<vint>(
             _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) != 0;
#else
  return vint{p[0], p[1], p[2], p[3]} != 0;
#endif
}

// How many lanes of a vector are in use: Full is known to the compiler, an int64_t is a remainder.
struct Full {};

// Flags of the lanes in use, 0 in the others. A null `p` stands for flags all set.
inline vint load_flags(const bool* p, Full) { return p == nullptr ? ~vint{} : load_flags(p); }

inline vint load_flags(const bool* p, int64_t count) {
  bool flags[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) flags[i] = p == nullptr || p[i];
  return load_flags(flags);
}

// Numbers of the lanes in use, 0 in the others.
inline vfloat load_first(const float* p, Full) { return load(p); }
inline vfloat load_first(const float* p, int64_t count) { return load_partial(p, count, 0.0f); }
inline void store_first(float* p, Full, vfloat v) { store(p, v); }
inline void store_first(float* p, int64_t count, vfloat v) { store_partial(p, count, v); }

// body(i, lanes in use) for every vector of 0 .. size.
template <typename Body>
inline void for_each_vector(int64_t size, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, Full{});
  if (i < size) body(i, size - i);
}

inline vfloat select(vint keep, vfloat v) { return keep ? v : broadcast(0.0f); }

// NaN stays NaN.
inline vfloat clamp(vfloat x, vfloat low, vfloat high) { return vmin(high, vmax(low, x)); }

// Sum of the lanes in float64, in a fixed order.
inline double reduce_add_double(vfloat v) {
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// A float32 sum that also carries what its roundings lost (Knuth's two-sum).
struct CompensatedSum {
  vfloat sum{}, lost{};

  void add(vfloat x) {
    const vfloat total = sum + x, added = total - sum;
    lost += (sum - (total - added)) + (x - added);
    sum = total;
  }
  double total() const { return reduce_add_double(sum) + reduce_add_double(lost); }
};

inline int64_t reduce_add(vint v) {
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline int64_t count_kept(const bool* mask, int64_t size) {
  vint negative_counts{};
  for_each_vector(size,
                  [&](int64_t i, auto lanes) { negative_counts += load_flags(mask + i, lanes); });
  return -reduce_add(negative_counts);
}

// A team no larger than the work pays for: waking a thread costs about as much as 8192 elements.
inline int team(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / 8192, 1, threads));
}

}  // namespace fastrl::cpu::FASTRL_ISA
