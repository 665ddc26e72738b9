// What one reading of dy gives: its products with lora_b and with the down-projection.
//
// A warp keeps 64 columns of dy, their rows of lora_b and their part of lora_b's gradient in
// registers and walks down the rows. It loads a tile of dy twice in the two layouts that the
// products need; the second time from the L1 cache. Column n of a product over ranks is rank
// 2 n + h of its 16, where h counts the two products that neighbouring ranks give.
#include "lora_tiles.cuh"
#include "ops.h"

namespace fastrl::cuda {
namespace {

constexpr int kCols = 64;                   // of a warp
constexpr int kBlockCols = kWarps * kCols;  // of a block
constexpr int kMostRows = 1024;             // of a block, multiples of kTile
constexpr int kFewestRows = 128;
constexpr int64_t kEnoughBlocks = 264;  // two for each multiprocessor of a large GPU

// How dy is cut into blocks, each of which gives one part of both gradients.
struct Cut {
  int64_t rows_of_block, row_blocks, col_blocks;

  Cut(int64_t rows, int64_t cols) : rows_of_block(kMostRows) {
    col_blocks = ceil_div<int64_t>(cols, kBlockCols);
    while (rows_of_block > kFewestRows &&
           ceil_div(rows, rows_of_block) * col_blocks < kEnoughBlocks) {
      rows_of_block /= 2;
    }
    row_blocks = ceil_div(rows, rows_of_block);
  }
};

// Of 16 rows and 16 ranks, what the lanes that share a column of the tensor cores' tiles need:
// x[i] holds ranks 2 g and 2 g + 1 of the i-th row of the lane.
template <typename T>
__device__ inline void load_ranks(const Matrix<T>& m, const int64_t (&rows)[4], int64_t rank,
                                  uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word[1];
    load_words(m, rows[i], rank, word);
    x[i] = word[0];
  }
}

// ddown_parts[column block, m, r] = sum over the block's columns o of dy[m, o] b[o, r] and
// db_parts[row block, o, r] = sum over the block's rows m of dy[m, o] down[m, r], for 16 kRankTiles
// ranks.
template <typename T, int kRankTiles>
__global__ void __launch_bounds__(kThreads)
    lora_up_backward_kernel(Matrix<T> dy, Matrix<T> down, Matrix<T> b, int64_t rows_of_block,
                            int64_t row_blocks, int64_t col_blocks, float* ddown_parts,
                            float* db_parts) {
  constexpr int kRanks = 16 * kRankTiles;
  __shared__ WarpTiles<kRanks> tiles[2];
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t row_block = blockIdx.x % row_blocks;
  const int64_t col_block = blockIdx.x / row_blocks % col_blocks;
  const int64_t first_rank = blockIdx.x / (row_blocks * col_blocks) * kRanks;
  const int64_t first_col = col_block * kBlockCols + warp * kCols;
  const int64_t begin = row_block * rows_of_block, end = min(dy.rows, begin + rows_of_block);

  uint32_t right[4][kRankTiles][2][2];  // b for the columns 16 w + 4 t + 0 .. 3
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int64_t col = first_col + 16 * w + 4 * t, cols[4] = {col, col + 1, col + 2, col + 3};
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n) {
      uint32_t x[4];
      load_ranks(b, cols, first_rank + 16 * n + 2 * g, x);
      right[w][n][0][0] = first_halves(x[0], x[1]), right[w][n][0][1] = first_halves(x[2], x[3]);
      right[w][n][1][0] = second_halves(x[0], x[1]), right[w][n][1][1] = second_halves(x[2], x[3]);
    }
  }

  float db[kRankTiles][8][4] = {};
  int side = 0;
  for (int64_t m = begin; m < end; m += kTile, side ^= 1) {
    uint32_t upper[4][2], lower[4][2];  // rows m + g and m + g + 8: columns 16 w + 4 t + 0 .. 3
    uint32_t cols[4][4][1];             // of the four rows: columns 16 w + 2 g + 0, 1
    const int64_t rows[4] = {m + 2 * t, m + 2 * t + 1, m + 2 * t + 8, m + 2 * t + 9};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      load_words(dy, m + g, first_col + 16 * w + 4 * t, upper[w]);
      load_words(dy, m + g + 8, first_col + 16 * w + 4 * t, lower[w]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) load_words(dy, rows[i], first_col + 16 * w + 2 * g, cols[i][w]);
    }
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n) {
      uint32_t x[4];
      load_ranks(down, rows, first_rank + 16 * n + 2 * g, x);
      const uint32_t left[4] = {first_halves(x[0], x[1]), second_halves(x[0], x[1]),
                                first_halves(x[2], x[3]), second_halves(x[2], x[3])};
      multiply_add_columns<T>(db[n], left, cols);
      float c[2][4] = {};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t tile[4] = {upper[w][0], lower[w][0], upper[w][1], lower[w][1]};
#pragma unroll
        for (int h = 0; h < 2; ++h) multiply_add<T>(c[h], tile, right[w][n][h]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          tiles[side].x[warp][g + i / 2 * 8][16 * n + 2 * (2 * t + i % 2) + h] = c[h][i];
        }
      }
    }
    __syncthreads();  // one a step: the other side's sums were read before the last one
    for (int e = threadIdx.x; e < kTile * kRanks; e += kThreads) {
      const int64_t row = m + e / kRanks, rank = first_rank + e % kRanks;
      if (row < end && rank < b.cols) {
        ddown_parts[(col_block * dy.rows + row) * b.cols + rank] =
            tiles[side].sum(e / kRanks, e % kRanks);
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kRankTiles; ++n) {
    const int64_t rank = first_rank + 16 * n + 2 * g;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t col = first_col + j / 2 * 16 + 2 * (2 * t + i) + j % 2;
        if (col < dy.cols && rank < b.cols) {
          float* at = db_parts + (row_block * dy.cols + col) * b.cols + rank;
          at[0] = db[n][j][i];
          at[1] = db[n][j][i + 2];
        }
      }
    }
  }
}

}  // namespace

int64_t lora_up_backward_workspace(int64_t rows, int64_t cols, int64_t rank) {
  const Cut cut(rows, cols);
  return (cut.col_blocks * rows + cut.row_blocks * cols) * rank;
}

void lora_up_backward(const void* dy, const void* down, int64_t down_stride, const void* lora_b,
                      int dtype, int64_t rows, int64_t cols, int64_t rank, float scaling,
                      float* workspace, void* ddown, int64_t ddown_stride, void* db, void* stream) {
  const Cut cut(rows, cols);
  float* db_parts = workspace + cut.col_blocks * rows * rank;
  dispatch_half(dtype, "lora_up_backward", [&](auto tag) {
    using T = decltype(tag);
    const Matrix<T> dy_matrix{static_cast<const T*>(dy), rows, cols, cols};
    const Matrix<T> down_matrix{static_cast<const T*>(down), rows, rank, down_stride};
    const Matrix<T> b_matrix{static_cast<const T*>(lora_b), cols, rank, rank};
    check_layout<4>("lora_up_backward: dy", dy_matrix);
    check_layout<2>("lora_up_backward: down", down_matrix);
    check_layout<2>("lora_up_backward: lora_b", b_matrix);
    const auto kernel = rank <= 16 ? lora_up_backward_kernel<T, 1> : lora_up_backward_kernel<T, 2>;
    const int64_t rank_blocks = ceil_div<int64_t>(rank, rank <= 16 ? 16 : 32);
    if (rows > 0) {
      const auto grid = static_cast<unsigned>(cut.row_blocks * cut.col_blocks * rank_blocks);
      FASTRL_LAUNCH(kernel, grid, kThreads, 0, stream, dy_matrix, down_matrix, b_matrix,
                    cut.rows_of_block, cut.row_blocks, cut.col_blocks, workspace, db_parts);
    }
    sum_parts(workspace, cut.col_blocks, rows * rank, scaling, static_cast<T*>(ddown), rank,
              ddown_stride, stream);
    sum_parts(db_parts, cut.row_blocks, cols * rank, scaling, static_cast<T*>(db), rank, rank,
              stream);
  });
  check_launch("lora_up_backward");
}

}  // namespace fastrl::cuda
