// Vectors of fp32 as wide as the instruction set, with loads and stores for every element type.
//
// Built on the compilers' vector extensions, so one source serves all instruction sets; intrinsics
// stand only where the extension has no word for the instruction. Include from files compiled with
// FASTRL_ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../dtypes.h"

namespace fastrl::cpu::FASTRL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vhalf __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = std::numeric_limits<float>::infinity();

inline vfloat broadcast(float value) { return vfloat{} + value; }

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// a > b ? a : b, so b when either is NaN.
inline vfloat vmax(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, so b when either is NaN.
inline vfloat vmin(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// For |x| < 2^22.
inline vfloat floor(vfloat x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_floor_ps(x);
#else
  const vfloat kRound = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vfloat n = (x + kRound) - kRound;
  return n > x ? n - 1.0f : n;
#endif
}

// Half precision without F16C: fp16 has 5 exponent bits, so moving the bits into fp32's place and
// multiplying by 2^112 (112 = 127 - 15) gives the value, subnormals included; inf and NaN keep a
// full exponent.
inline float fp16_to_float(uint16_t bits) {
  uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float value = bit_cast<float>(magnitude) * 0x1p112f;
  if ((bits & 0x7c00) == 0x7c00) value = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(value) | static_cast<uint32_t>(bits & 0x8000) << 16);
}

inline uint16_t float_to_fp16(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: let the adder round to 2^-24
    float shifted = bit_cast<float>(bits) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  bits += 0xfff + ((bits >> 13) & 1);  // round to nearest even
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) { return fp16_to_float(x.bits); }

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// GCC splits __builtin_convertvector into halves, so widening and narrowing use the instructions by
// name.
inline vuint widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return bit_cast<vuint>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<vuint>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vhalf half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, vuint);
#endif
}

inline void narrow(uint16_t* p, vuint v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
  __m256i ordered = _mm256_permute4x64_epi64(packed, 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
#else
  vhalf half = __builtin_convertvector(v, vhalf);
  std::memcpy(p, &half, sizeof(half));
#endif
}

inline vfloat load(const bf16* p) { return bit_cast<vfloat>(widen(&p->bits) << 16); }

inline vfloat load(const fp16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = fp16_to_float(p[i].bits);
  return v;
#endif
}

inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds to nearest even; NaN stays NaN.
inline void store(bf16* p, vfloat v) {
  vuint bits = bit_cast<vuint>(v);
  vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vuint quiet_nan = (bits >> 16) | 0x40;
  narrow(&p->bits, v == v ? rounded : quiet_nan);
}

inline void store(fp16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_fp16(v[i]);
#endif
}

// The first `count` < kLanes elements; the other lanes hold `fill`.
template <typename T>
inline vfloat load_partial(const T* p, int64_t count, float fill) {
  vfloat v = broadcast(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

template <typename T>
inline void store_partial(T* p, int64_t count, vfloat v) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

template <typename T>
inline void store_scalar(T* p, float value) {
  store_partial(p, 1, broadcast(value));
}

// Fixed order, so sums repeat bit for bit.
inline float reduce_add(vfloat v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float reduce_max(vfloat v) {
  float best = -kInf;
  for (int i = 0; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Of a comparison's result: whether it holds for some lane.
inline bool any(vint v) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= v[i];
  return found != 0;
}

// 2^x: 0 below -126 (AVX-512: below -150), infinity from 128, NaN stays NaN. Relative error under
// 3e-7, exact at 0. With x = n + f, n = floor(x): 2^n moves the exponent, a polynomial of degree 5
// gives 2^f.
inline vfloat exp2(vfloat x) {
#if defined(__AVX512DQ__)
  vfloat f = _mm512_reduce_ps(
      x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x); 0 for infinities
#else
  vfloat clamped = vmin(broadcast(128.0f), vmax(broadcast(-127.0f), x));
  vfloat n = floor(clamped);
  vfloat f = clamped - n;
#endif
  vfloat p = broadcast(1.867139584e-3f);
  p = p * f + 9.017010178e-3f;
  p = p * f + 5.579992751e-2f;
  p = p * f + 2.401644462e-1f;
  p = p * f + 6.931513121e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
#else
  vfloat result = bit_cast<vfloat>(bit_cast<vint>(p) + (__builtin_convertvector(n, vint) << 23));
  return x < broadcast(-126.0f) ? broadcast(0.0f) : result;
#endif
}

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// e^x; see exp2.
inline vfloat exp(vfloat x) { return exp2(x * kLog2e); }

}  // namespace fastrl::cpu::FASTRL_ISA
