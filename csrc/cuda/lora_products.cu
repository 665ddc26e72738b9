// The products of a LoRA layer that dropout is in, in bf16 or fp16: two read the input x once and
// drop it on the way, one drops what it writes. None makes a dropped copy of x.
//
// Tensor cores take sums over 16 columns in any order, so a lane holds the columns that one memory
// access and four Philox words give it: of a block of 64 columns, columns 16 w + n for w = 0 .. 3,
// whose words are those of counter n.
#include "mma.cuh"
#include "ops.h"
#include "philox.cuh"

namespace fastrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 16;              // rows of one product's left factor
constexpr int kCounters = 16;          // Philox counters of a block of columns
constexpr int kBlock = 4 * kCounters;  // its columns
constexpr int kRowsOfSplit = 1024;     // rows that one part of the gradient sums over
constexpr int kGradientTiles = 2;      // ranks of a block of the gradient, in tiles
constexpr int kInputTiles = 2;         // rows of a warp of the input's gradient, in tiles

// (rows, cols), cols contiguous; T is bf16 or fp16.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, cols, stride;
};

struct Dropout {
  const int64_t* seed;  // null for none
  uint32_t threshold;
};

// Four elements from a column that is a multiple of 4 must be one access.
template <typename T>
void check_layout(const char* op, const Matrix<T>& x) {
  if (x.cols % 4 != 0 || x.stride % 4 != 0 || reinterpret_cast<uintptr_t>(x.data) % 8 != 0) {
    throw std::invalid_argument(std::string(op) +
                                ": expected rows that start at multiples of 8 bytes"
                                " and have a multiple of 4 elements");
  }
}

template <typename T>
__device__ inline uint32_t bits_at(const Matrix<T>& x, int64_t row, int64_t col) {
  return row < x.rows && col < x.cols ? x.data[row * x.stride + col].bits : 0u;
}

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t x[kWords];
};

// 2 kWords neighbours of a row, 0 outside the matrix; col is a multiple of 2 kWords.
template <int kWords, typename T>
__device__ inline void load_words(const Matrix<T>& x, int64_t row, int64_t col,
                                  uint32_t (&words)[kWords]) {
  Words<kWords> found{};
  if (row < x.rows && col < x.cols) {
    found = *reinterpret_cast<const Words<kWords>*>(x.data + row * x.stride + col);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = found.x[i];
}

// Drops what a lane holds of one row and one block of columns: element i of x[w] is column
// 16 w + first + i.
template <int kWords>
__device__ inline void drop(const Dropout& dropout, int64_t row, int64_t block, int first,
                            uint32_t (&x)[4][kWords]) {
  if (dropout.seed == nullptr) return;
#pragma unroll
  for (int i = 0; i < 2 * kWords; ++i) {
    const auto counter = static_cast<uint32_t>(block * kCounters + first + i);
    const PhiloxWords words = philox(counter, row, *dropout.seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (words.w[w] < dropout.threshold) x[w][i / 2] &= i % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
    }
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

// down[m, r] = sum_k D(x)[m, k] a[r, k] for 16 kRowTiles rows and 8 kRankTiles ranks. The block's
// warps share the columns, so a row's bits do not depend on how many rows there are.
template <typename T, int kRowTiles, int kRankTiles>
__global__ void __launch_bounds__(kThreads)
    lora_down_kernel(Matrix<T> x, Matrix<T> a, Dropout dropout, int64_t rank_blocks, T* down) {
  constexpr int kRanks = 8 * kRankTiles;
  __shared__ WarpTiles<kRanks> tiles;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t first_row = blockIdx.x / rank_blocks * (kRowTiles * kTile);
  const int64_t first_rank = blockIdx.x % rank_blocks * kRanks;
  float c[kRowTiles][kRankTiles][4] = {};
  for (int64_t block = warp; block * kBlock < x.cols; block += kWarps) {
    const int64_t col = block * kBlock + 4 * t;
    uint32_t rows[2 * kRowTiles][4][2];  // rows g, g + 8, ..: columns col + 16 w + 0 .. 3
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        load_words(x, first_row + 8 * i + g, col + 16 * w, rows[i][w]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      drop(dropout, first_row + 8 * i + g, block, 4 * t, rows[i]);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
        uint32_t right[2];
        load_words(a, first_rank + 8 * n + g, col + 16 * w, right);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const uint32_t (&upper)[2] = rows[2 * r][w];
          const uint32_t (&lower)[2] = rows[2 * r + 1][w];
          multiply_add<T>(c[r][n], {upper[0], lower[0], upper[1], lower[1]}, right);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tiles.x[warp][g + i / 2 * 8][8 * n + 2 * t + i % 2] = c[r][n][i];
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kTile * kRanks; e += kThreads) {
      const int64_t row = first_row + r * kTile + e / kRanks, rank = first_rank + e % kRanks;
      if (row < x.rows && rank < a.rows) {
        down[row * a.rows + rank] = from_float<T>(tiles.sum(e / kRanks, e % kRanks));
      }
    }
  }
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

// parts[s, r, k] = sum over the rows m of split s of ddown[m, r] D(x)[m, k], for 64 columns. The
// block's warps share the rows of the split.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_da_kernel(Matrix<T> x, Matrix<T> ddown, Dropout dropout, int64_t rank_blocks,
                   int64_t col_blocks, float* parts) {
  __shared__ WarpTiles<kBlock> tiles;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t first_rank = blockIdx.x % rank_blocks * (kGradientTiles * kTile);
  const int64_t block = blockIdx.x / rank_blocks % col_blocks;
  const int64_t split = blockIdx.x / (rank_blocks * col_blocks);
  const int64_t end = min(x.rows, (split + 1) * kRowsOfSplit);
  float c[kGradientTiles][8][4] = {};
  for (int64_t m = split * kRowsOfSplit + warp * kTile; m < end; m += kWarps * kTile) {
    const int64_t rows[4] = {m + 2 * t, m + 2 * t + 1, m + 2 * t + 8, m + 2 * t + 9};
    uint32_t cols[4][4][1];  // of the four rows: columns 16 w + 2 g + 0, 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        load_words(x, rows[i], block * kBlock + 16 * w + 2 * g, cols[i][w]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) drop(dropout, rows[i], block, 2 * g, cols[i]);
#pragma unroll
    for (int r = 0; r < kGradientTiles; ++r) {
      uint32_t left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t rank = first_rank + r * kTile + g + i % 2 * 8;
        left[i] = bits_at(ddown, rows[i / 2 * 2], rank) | bits_at(ddown, rows[i / 2 * 2 + 1], rank)
                                                              << 16;
      }
      multiply_add_columns<T>(c[r], left, cols);
    }
  }
#pragma unroll
  for (int r = 0; r < kGradientTiles; ++r) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tiles.x[warp][g + i / 2 * 8][j / 2 * 16 + 2 * (2 * t + i % 2) + j % 2] = c[r][j][i];
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kTile * kBlock; e += kThreads) {
      const int64_t rank = first_rank + r * kTile + e / kBlock, col = block * kBlock + e % kBlock;
      if (rank < ddown.cols && col < x.cols) {
        parts[(split * ddown.cols + rank) * x.cols + col] = tiles.sum(e / kBlock, e % kBlock);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_da_sum_kernel(const float* parts, int64_t splits, int64_t size, T* da) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= size) return;
  float total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) total += parts[s * size + i];
  da[i] = from_float<T>(total);
}

template <typename T>
__device__ inline uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

// dx[m, k] = D(sum_r ddown[m, r] a[r, k]) for 64 columns; a warp has 16 kInputTiles rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_dx_kernel(Matrix<T> ddown, Matrix<T> a, Dropout dropout, int64_t col_blocks, T* dx) {
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t block = blockIdx.x % col_blocks;
  const int64_t first_row = (blockIdx.x / col_blocks * kWarps + warp) * (kInputTiles * kTile);
  float c[kInputTiles][8][4] = {};
  for (int64_t rank = 0; rank < a.rows; rank += kTile) {
    uint32_t cols[4][4][1];  // of ranks 2t, 2t + 1, 2t + 8, 2t + 9: columns 16 w + 2 g + 0, 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t row = rank + 2 * t + i % 2 + i / 2 * 8;
        load_words(a, row, block * kBlock + 16 * w + 2 * g, cols[i][w]);
      }
    }
#pragma unroll
    for (int r = 0; r < kInputTiles; ++r) {
      uint32_t left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + r * kTile + g + i % 2 * 8, at = rank + 2 * t + i / 2 * 8;
        left[i] = bits_at(ddown, row, at) | bits_at(ddown, row, at + 1) << 16;
      }
      multiply_add_columns<T>(c[r], left, cols);
    }
  }
#pragma unroll
  for (int r = 0; r < 2 * kInputTiles; ++r) {
    const int64_t row = first_row + 8 * r + g;
    uint32_t words[4][2];  // columns 16 w + 4 t + 0 .. 3: n = 2t of both products, then n = 2t + 1
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = r % 2 * 2 + i;
        words[w][i] = pack<T>(c[r / 2][2 * w][at], c[r / 2][2 * w + 1][at]);
      }
    }
    drop(dropout, row, block, 4 * t, words);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t col = block * kBlock + 16 * w + 4 * t;
      if (row < ddown.rows && col < a.cols) {
        *reinterpret_cast<Words<2>*>(dx + row * a.cols + col) = {words[w][0], words[w][1]};
      }
    }
  }
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

}  // namespace

void lora_down(const void* x, int64_t x_stride, const void* lora_a, int dtype, int64_t rows,
               int64_t cols, int64_t rank, const int64_t* seed, uint32_t threshold, void* down,
               void* stream) {
  if (rows == 0) return;
  dispatch_half(dtype, "lora_down", [&](auto tag) {
    using T = decltype(tag);
    const Matrix<T> x_matrix{static_cast<const T*>(x), rows, cols, x_stride};
    const Matrix<T> a_matrix{static_cast<const T*>(lora_a), rank, cols, cols};
    check_layout("lora_down: x", x_matrix);
    check_layout("lora_down: lora_a", a_matrix);
    constexpr int kRowTiles = 2;
    const auto kernel =
        rank <= 16 ? lora_down_kernel<T, kRowTiles, 2> : lora_down_kernel<T, kRowTiles, 4>;
    const int64_t rank_blocks = ceil_div<int64_t>(rank, rank <= 16 ? 16 : 32);
    const auto grid =
        static_cast<unsigned>(ceil_div<int64_t>(rows, kRowTiles * kTile) * rank_blocks);
    FASTRL_LAUNCH(kernel, grid, kThreads, 0, stream, x_matrix, a_matrix, (Dropout{seed, threshold}),
                  rank_blocks, static_cast<T*>(down));
  });
  check_launch("lora_down");
}

int64_t lora_da_workspace(int64_t rows, int64_t cols, int64_t rank) {
  return ceil_div<int64_t>(rows, kRowsOfSplit) * cols * rank;
}

void lora_da(const void* x, int64_t x_stride, const void* ddown, int dtype, int64_t rows,
             int64_t cols, int64_t rank, const int64_t* seed, uint32_t threshold, float* workspace,
             void* da, void* stream) {
  const int64_t splits = ceil_div<int64_t>(rows, kRowsOfSplit), size = rank * cols;
  const int64_t rank_blocks = ceil_div<int64_t>(rank, kGradientTiles * kTile);
  const int64_t col_blocks = ceil_div<int64_t>(cols, kBlock);
  dispatch_half(dtype, "lora_da", [&](auto tag) {
    using T = decltype(tag);
    const Matrix<T> x_matrix{static_cast<const T*>(x), rows, cols, x_stride};
    const Matrix<T> ddown_matrix{static_cast<const T*>(ddown), rows, rank, rank};
    check_layout("lora_da: x", x_matrix);
    if (splits > 0) {
      const auto grid = static_cast<unsigned>(splits * rank_blocks * col_blocks);
      FASTRL_LAUNCH(lora_da_kernel<T>, grid, kThreads, 0, stream, x_matrix, ddown_matrix,
                    (Dropout{seed, threshold}), rank_blocks, col_blocks, workspace);
    }
    const auto grid = static_cast<unsigned>(ceil_div<int64_t>(size, kThreads));
    FASTRL_LAUNCH(lora_da_sum_kernel<T>, grid, kThreads, 0, stream, workspace, splits, size,
                  static_cast<T*>(da));
  });
  check_launch("lora_da");
}

void lora_dx(const void* ddown, const void* lora_a, int dtype, int64_t rows, int64_t cols,
             int64_t rank, const int64_t* seed, uint32_t threshold, void* dx, void* stream) {
  if (rows == 0) return;
  dispatch_half(dtype, "lora_dx", [&](auto tag) {
    using T = decltype(tag);
    const Matrix<T> ddown_matrix{static_cast<const T*>(ddown), rows, rank, rank};
    const Matrix<T> a_matrix{static_cast<const T*>(lora_a), rank, cols, cols};
    check_layout("lora_dx: lora_a", a_matrix);
    const int64_t col_blocks = ceil_div<int64_t>(cols, kBlock);
    const int64_t row_blocks = ceil_div<int64_t>(rows, kWarps * kInputTiles * kTile);
    FASTRL_LAUNCH(lora_dx_kernel<T>, static_cast<unsigned>(row_blocks * col_blocks), kThreads, 0,
                  stream, ddown_matrix, a_matrix, (Dropout{seed, threshold}), col_blocks,
                  static_cast<T*>(dx));
  });
  check_launch("lora_dx");
}

}  // namespace fastrl::cuda
