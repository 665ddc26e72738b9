// The products of a LoRA layer that dropout is in, in bf16 or fp16: two read the input x once and
// drop it on the way, one drops what it writes. None makes a dropped copy of x.
//
// Tensor cores take sums over 16 columns in any order, so a lane holds the columns that one memory
// access and four Philox words give it: of a block of 64 columns, columns 16 w + n for w = 0 .. 3,
// whose words are those of counter n.
#include "lora_tiles.cuh"
#include "ops.h"
#include "philox.cuh"

namespace fastrl::cuda {
namespace {

constexpr int kCounters = 16;          // Philox counters of a block of columns
constexpr int kBlock = 4 * kCounters;  // its columns
constexpr int kRowsOfSplit = 1024;     // rows that one part of the gradient sums over
constexpr int kGradientTiles = 2;      // ranks of a block of the gradient, in tiles
constexpr int kInputTiles = 2;         // rows of a warp of the input's gradient, in tiles
constexpr int64_t kFewRows = 8192;     // from more on, a block of lora_down has two tiles of rows

struct Dropout {
  const int64_t* seed;  // null for none
  uint32_t threshold;
};

// A Dropout whose seed is at hand.
struct Draw {
  bool on;
  uint32_t threshold;
  int64_t seed;

  __device__ explicit Draw(const Dropout& d)
      : on(d.seed != nullptr), threshold(d.threshold), seed(on ? *d.seed : 0) {}
};

// Drops what a lane holds of one row and one block of columns: element i of x[w] is column
// 16 w + first + i.
template <int kWords>
__device__ inline void drop(const Draw& draw, int64_t row, int64_t block, int first,
                            uint32_t (&x)[4][kWords]) {
  if (!draw.on) return;
#pragma unroll
  for (int i = 0; i < 2 * kWords; ++i) {
    const auto counter = static_cast<uint32_t>(block * kCounters + first + i);
    const PhiloxWords words = philox(counter, row, draw.seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (words.w[w] < draw.threshold) x[w][i / 2] &= i % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
    }
  }
}

// down[m, r] = sum_k D(x)[m, k] a[r, k] for 16 kRowTiles rows and 8 kRankTiles ranks. The block's
// warps share the columns, so a row's bits do not depend on how many rows there are.
template <typename T, int kRowTiles, int kRankTiles>
__global__ void __launch_bounds__(kThreads)
    lora_down_kernel(Matrix<T> x, Matrix<T> a, Dropout dropout, int64_t rank_blocks, T* down) {
  constexpr int kRanks = 8 * kRankTiles;
  const Draw draw(dropout);
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
      drop(draw, first_row + 8 * i + g, block, 4 * t, rows[i]);
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

// parts[s, r, k] = sum over the rows m of split s of ddown[m, r] D(x)[m, k], for 64 columns. The
// block's warps share the rows of the split.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_da_kernel(Matrix<T> x, Matrix<T> ddown, Dropout dropout, int64_t rank_blocks,
                   int64_t col_blocks, float* parts) {
  __shared__ WarpTiles<kBlock> tiles;
  const Draw draw(dropout);
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
    for (int i = 0; i < 4; ++i) drop(draw, rows[i], block, 2 * g, cols[i]);
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
__device__ inline uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

// dx[m, k] = D(sum_r ddown[m, r] a[r, k]) for 64 columns; a warp has 16 kInputTiles rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_dx_kernel(Matrix<T> ddown, Matrix<T> a, Dropout dropout, int64_t col_blocks, T* dx) {
  const Draw draw(dropout);
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
    drop(draw, row, block, 4 * t, words);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t col = block * kBlock + 16 * w + 4 * t;
      if (row < ddown.rows && col < a.cols) {
        *reinterpret_cast<Neighbours<2>*>(dx + row * a.cols + col) = {words[w][0], words[w][1]};
      }
    }
  }
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
    check_layout<4>("lora_down: x", x_matrix);
    check_layout<4>("lora_down: lora_a", a_matrix);
    const int tiles = rank > 16 || rows <= kFewRows ? 1 : 2;
    const auto kernel = rank > 16    ? lora_down_kernel<T, 1, 4>
                        : tiles == 1 ? lora_down_kernel<T, 1, 2>
                                     : lora_down_kernel<T, 2, 2>;
    const int64_t rank_blocks = ceil_div<int64_t>(rank, rank > 16 ? 32 : 16);
    const auto grid = static_cast<unsigned>(ceil_div<int64_t>(rows, tiles * kTile) * rank_blocks);
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
    check_layout<4>("lora_da: x", x_matrix);
    if (splits > 0) {
      const auto grid = static_cast<unsigned>(splits * rank_blocks * col_blocks);
      FASTRL_LAUNCH(lora_da_kernel<T>, grid, kThreads, 0, stream, x_matrix, ddown_matrix,
                    (Dropout{seed, threshold}), rank_blocks, col_blocks, workspace);
    }
    sum_parts(workspace, splits, size, 1.0f, static_cast<T*>(da), cols, cols, stream);
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
    check_layout<4>("lora_dx: lora_a", a_matrix);
    const int64_t col_blocks = ceil_div<int64_t>(cols, kBlock);
    const int64_t row_blocks = ceil_div<int64_t>(rows, kWarps * kInputTiles * kTile);
    FASTRL_LAUNCH(lora_dx_kernel<T>, static_cast<unsigned>(row_blocks * col_blocks), kThreads, 0,
                  stream, ddown_matrix, a_matrix, (Dropout{seed, threshold}), col_blocks,
                  static_cast<T*>(dx));
  });
  check_launch("lora_dx");
}

}  // namespace fastrl::cuda
