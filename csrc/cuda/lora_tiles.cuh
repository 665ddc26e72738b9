// What the products of a LoRA layer are made of: loads of bf16 or fp16 matrices in the layouts that
// the tensor cores take, sums over the warps of a block and over the parts of a gradient.
#pragma once

#include "reduce.cuh"
#include "types.cuh"

namespace fastrl::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 16;  // rows of one product's left factor

// (rows, cols), cols contiguous; T is bf16 or fp16.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, cols, stride;
};

// kElements from a column that is a multiple of kElements must be one access.
template <int kElements, typename T>
void check_layout(const char* name, const Matrix<T>& x) {
  if (x.cols % kElements == 0 && x.stride % kElements == 0 &&
      reinterpret_cast<uintptr_t>(x.data) % (kElements * sizeof(T)) == 0) {
    return;
  }
  throw std::invalid_argument(std::string(name) + ": expected rows that start at multiples of " +
                              std::to_string(kElements * sizeof(T)) +
                              " bytes and have a multiple of " + std::to_string(kElements) +
                              " elements");
}

template <typename T>
__device__ inline uint32_t bits_at(const Matrix<T>& x, int64_t row, int64_t col) {
  return row < x.rows && col < x.cols ? x.data[row * x.stride + col].bits : 0u;
}

template <int kWords>
struct alignas(4 * kWords) Neighbours {
  uint32_t x[kWords];
};

// 2 kWords neighbours of a row, 0 outside the matrix; col is a multiple of 2 kWords.
template <int kWords, typename T>
__device__ inline void load_words(const Matrix<T>& x, int64_t row, int64_t col,
                                  uint32_t (&words)[kWords]) {
  Neighbours<kWords> found{};
  if (row < x.rows && col < x.cols) {
    found = *reinterpret_cast<const Neighbours<kWords>*>(x.data + row * x.stride + col);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = found.x[i];
}

// Both halves of two words as two words: the first elements, or the second ones.
__device__ inline uint32_t first_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
__device__ inline uint32_t second_halves(uint32_t a, uint32_t b) {
  return a >> 16 | (b & 0xffff0000u);
}

// c += left times 16 rows of 64 columns; cols holds, of rows 2t, 2t + 1, 2t + 8, 2t + 9, columns
// 16 w + 2 g + 0, 1. Column n of product 2 w + h is column 16 w + 2 n + h.
template <typename T>
__device__ inline void multiply_add_columns(float (&c)[8][4], const uint32_t (&left)[4],
                                            const uint32_t (&cols)[4][4][1]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t x[4] = {cols[0][w][0], cols[1][w][0], cols[2][w][0], cols[3][w][0]};
    multiply_add<T>(c[2 * w], left, {first_halves(x[0], x[1]), first_halves(x[2], x[3])});
    multiply_add<T>(c[2 * w + 1], left, {second_halves(x[0], x[1]), second_halves(x[2], x[3])});
  }
}

// What every warp has of a tile of kTile rows; their sum in the order of the warps.
template <int kCols>
struct WarpTiles {
  float x[kWarps][kTile][kCols];

  __device__ float sum(int row, int col) const {
    float total = x[0][row][col];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total += x[warp][row][col];
    return total;
  }
};

// out (.., cols) = scale times the sum of `splits` matrices of `size` elements, in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_sum_kernel(const float* parts, int64_t splits, int64_t size, float scale, T* out,
                    int64_t cols, int64_t out_stride) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= size) return;
  float total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) total += parts[s * size + i];
  out[i / cols * out_stride + i % cols] = from_float<T>(scale * total);
}

template <typename T>
void sum_parts(const float* parts, int64_t splits, int64_t size, float scale, T* out, int64_t cols,
               int64_t out_stride, void* stream) {
  if (size == 0) return;
  const auto grid = static_cast<unsigned>(ceil_div<int64_t>(size, kThreads));
  FASTRL_LAUNCH(lora_sum_kernel<T>, grid, kThreads, 0, stream, parts, splits, size, scale, out,
                cols, out_stride);
}

// Calls body with a value of the 16-bit type that `dtype` names.
template <typename Body>
void dispatch_half(int dtype, const char* op, Body&& body) {
  dispatch_dtype(dtype, op, [&](auto tag) {
    if constexpr (sizeof(tag) == 2) {
      body(tag);
    } else {
      throw std::invalid_argument(std::string(op) + ": dtype: expected bfloat16 or float16");
    }
  });
}

}  // namespace fastrl::cuda
