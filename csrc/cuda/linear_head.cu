// Row kernels of linear_logprobs and linear_cross_entropy, on chunks of float32 logits between the
// library's multiplications.
#include "ops.h"
#include "softmax_gradient.cuh"

namespace fastrl::cuda {
namespace {

constexpr unsigned kMaxCluster = 8;  // the largest that every device with clusters takes

// A row is shared by more blocks while a block's part is larger. Three of these, as many blocks as
// the registers allow, fit on a multiprocessor of sm_90.
constexpr size_t kPreferredBytes = 72 << 10;

// The shared memory of one of the blocks that keep a row.
struct OnChipRow {
  float* logits;      // of the block's tiles
  Partial* partials;  // of the block's tiles
  Partial* row;       // partials of all tiles of the row
  Partial* slots;

  __host__ __device__ static size_t bytes(int tiles, int tiles_per_block) {
    return tiles_per_block * (kTile<float> * sizeof(float) + sizeof(Partial)) +
           (tiles + kSlots) * sizeof(Partial);
  }

  __device__ OnChipRow(unsigned char* memory, int tiles, int tiles_per_block)
      : logits(reinterpret_cast<float*>(memory)),
        partials(reinterpret_cast<Partial*>(logits + tiles_per_block * kTile<float>)),
        row(partials + tiles_per_block),
        slots(row + tiles) {}

  // The calling lane's packs of the block's tile `place` are every kWarp-th from here on.
  __device__ Words<float>* lane_packs(int place) const {
    return reinterpret_cast<Words<float>*>(logits + place * kTile<float>) + lane_index();
  }

  // Begins to read tile `tile` of the row as the block's `place`-th; one warp.
  __device__ void begin_tile(const float* x, int tile, int place, int64_t vocab) const {
    Words<float>* kept = lane_packs(place);
    const int64_t begin = int64_t{tile} * kTile<float>;
    if (begin + kTile<float> <= vocab) {
      const auto* from = reinterpret_cast<const Words<float>*>(x + begin) + lane_index();
#pragma unroll
      for (int i = 0; i < kTilePacks; ++i) begin_copy(kept + i * kWarp, from + i * kWarp);
      return;
    }
    Words<float> packs[kTilePacks];
    load_tile<true>(x, tile, vocab, packs);
#pragma unroll
    for (int i = 0; i < kTilePacks; ++i) kept[i * kWarp] = packs[i];
  }

  // Tile `tile`, the block's `place`-th, once the lanes' own packs are there.
  template <bool kSoftcap>
  __device__ void sum_tile(int tile, int place, const Target& target, const LogitMap& map) const {
    const Words<float>* kept = lane_packs(place);
    Words<float> packs[kTilePacks];
#pragma unroll
    for (int i = 0; i < kTilePacks; ++i) packs[i] = kept[i * kWarp];
    const Partial part = tile_partial<kSoftcap, true>(packs, tile, target, map);
    if (lane_index() == 0) partials[place] = part;
  }

  // Of all tiles, once every block of the cluster has read its own; every thread.
  __device__ Partial combine_row(int tiles, int tiles_per_block, float scale) const {
    for (int tile = threadIdx.x; tile < tiles; tile += kRowThreads) {
      row[tile] = map_shared(partials, tile / tiles_per_block)[tile % tiles_per_block];
    }
    __syncthreads();
    if (threadIdx.x < kSlots) {
      Partial total = no_columns();
      for (int tile = threadIdx.x; tile < tiles; tile += kSlots) {
        total = combine(total, row[tile], scale);
      }
      slots[threadIdx.x] = total;
    }
    __syncthreads();
    return combine_slots(slots, scale);
  }
};

// A cluster of blocks reads a row, which begins at a 16-byte boundary, once, keeps it in shared
// memory, and writes its gradients once. They may lie in the logits' own row.
template <bool kSoftcap, Gradient kGradient, typename Out>
__global__ void __launch_bounds__(kRowThreads, 3)
    linear_head_kernel(Rows logits, const int64_t* token_ids, const bool* mask, int64_t rows,
                       int64_t vocab, int tiles_per_block, LogitMap map, RowOutputs results,
                       Rows out, Rows entropy_out) {
  FASTRL_DYNAMIC_SHARED(memory);
  const int tiles = tiles_of<float>(vocab);
  const OnChipRow chip(memory, tiles, tiles_per_block);
  const unsigned blocks = cluster_size(), rank = cluster_rank();
  const int first = min(static_cast<int>(rank) * tiles_per_block, tiles);
  const int last = min(first + tiles_per_block, tiles);
  const int64_t begin = min(int64_t{first} * kTile<float>, vocab);
  const int64_t count = min(int64_t{last} * kTile<float>, vocab) - begin;

  for (int64_t row = blockIdx.x / blocks; row < rows; row += gridDim.x / blocks) {
    Out* dlogits = row_pointer<Out>(out, row) + begin;
    Out* dentropy = nullptr;
    if (kGradient == Gradient::both) dentropy = row_pointer<Out>(entropy_out, row) + begin;
    const bool writes_results = rank == 0 && threadIdx.x == 0;
    if (mask != nullptr && !mask[row]) {
      if (writes_results) results.write(row, RowResult{});
      zero_span(dlogits, count);
      if (kGradient == Gradient::both) zero_span(dentropy, count);
      continue;
    }
    const float* x = row_pointer<const float>(logits, row);
    for (int tile = first + warp_index(); tile < last; tile += kSlots) {
      chip.begin_tile(x, tile, tile - first, vocab);
    }
    const Target target = read_target(x, token_ids[row], vocab, results.top1 != nullptr);
    const float logit = target.capped<kSoftcap>(vocab, map);
    wait_for_copies();
    for (int tile = first + warp_index(); tile < last; tile += kSlots) {
      chip.sum_tile<kSoftcap>(tile, tile - first, target, map);
    }
    cluster_sync();  // partials are there, and nobody reads the row's memory any more
    const Partial rest = chip.combine_row(tiles, tiles_per_block, map.scale());
    cluster_arrive_relaxed();  // says only that the others' partials were read: no store waits
    const RowResult result = finish_row(rest, logit, map);
    if (writes_results) results.write(row, result);
    const RowGradient<kSoftcap, kGradient> gradient(result, 1.0f, 1.0f, map);
    gradient_span(gradient, chip.logits, count, target.id - begin, dlogits, dentropy);
    __syncthreads();  // the block has read its logits
    cluster_wait();   // the others have read this block's partials
  }
}

struct Plan {
  unsigned blocks;  // that share a row; 0: the row does not fit
  int tiles_per_block;
  size_t bytes;
};

Plan plan_of(int tiles, unsigned max_blocks, size_t limit) {
  unsigned blocks = 1;
  auto per_block = [&] { return ceil_div(tiles, static_cast<int>(blocks)); };
  while (blocks < max_blocks && OnChipRow::bytes(tiles, per_block()) > kPreferredBytes) {
    blocks *= 2;
  }
  const size_t bytes = OnChipRow::bytes(tiles, per_block());
  return {bytes <= limit ? blocks : 0, per_block(), bytes};
}

// How a row of so many tiles is kept by a kernel of this file; all of them are compiled alike.
template <typename Kernel>
Plan plan_for(Kernel kernel, int64_t vocab) {
  const DeviceLimits limits = device_limits();
  const bool clusters = limits.clusters && compiled_for_clusters(kernel);
  return plan_of(tiles_of<float>(vocab), clusters ? kMaxCluster : 1, limits.shared_bytes);
}

bool is_aligned(const Rows& rows) {
  constexpr int64_t kSize = Pack<float>::kSize;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.outer_stride % kSize == 0 &&
         rows.inner_stride % kSize == 0;
}

// False if the rows do not fit on chip.
template <bool kSoftcap, Gradient kGradient, typename Out>
bool launch_on_chip(Rows logits, const int64_t* token_ids, const bool* mask, int64_t rows,
                    int64_t vocab, LogitMap map, RowOutputs results, Rows out, Rows entropy_out,
                    void* stream) {
  const auto kernel = linear_head_kernel<kSoftcap, kGradient, Out>;
  const Plan plan = plan_for(kernel, vocab);
  if (plan.blocks == 0 || !is_aligned(logits)) return false;
  const unsigned grid = grid_of(rows * plan.blocks) / plan.blocks * plan.blocks;
  const int tiles_per_block = plan.tiles_per_block;
  FASTRL_LAUNCH_CLUSTER(kernel, plan.blocks, grid, kRowThreads, plan.bytes, stream, logits,
                        token_ids, mask, rows, vocab, tiles_per_block, map, results, out,
                        entropy_out);
  return true;
}

void require_float32(const Rows& logits) {
  if (logits.dtype != static_cast<int>(DType::f32)) {
    throw std::invalid_argument("linear_head: logits: expected float32 (code 0), got dtype code " +
                                std::to_string(logits.dtype));
  }
}

}  // namespace

bool linear_head_on_chip(int64_t vocab) {
  return plan_for(linear_head_kernel<false, Gradient::logprob, float>, vocab).blocks != 0;
}

void linear_head_rows(Rows logits, const int64_t* token_ids, const bool* mask, int64_t rows,
                      int64_t vocab, float inv_temperature, float softcap, float* logprobs,
                      float* row_stats, float* entropy, bool* top1, Rows out, Rows entropy_out,
                      void* stream) {
  require_float32(logits);
  auto read_only = [&] {
    token_logprobs_fwd(rows, vocab, logits, token_ids, mask, inv_temperature, softcap, logprobs,
                       row_stats, entropy, top1, nullptr, stream);
  };
  if (rows == 0 || out.data == nullptr) return read_only();
  if (row_stats == nullptr || (entropy_out.data != nullptr && entropy == nullptr)) {
    throw std::invalid_argument("linear_head: out needs row_stats, entropy_out needs entropy");
  }
  const LogitMap map{inv_temperature, softcap};
  const RowOutputs results{logprobs, row_stats, entropy, top1};
  dispatch_dtype(out.dtype, "linear_head", [&](auto tag) {
    using Out = decltype(tag);
    dispatch_flags(softcap > 0, entropy_out.data != nullptr, [&](auto cap, auto both) {
      constexpr Gradient kGradient = both.value ? Gradient::both : Gradient::logprob;
      if (launch_on_chip<cap.value, kGradient, Out>(logits, token_ids, mask, rows, vocab, map,
                                                    results, out, entropy_out, stream)) {
        return;
      }
      if (out.data == logits.data && sizeof(Out) < sizeof(float)) {
        throw std::invalid_argument(
            "linear_head: out: a gradient of 16 bits in the logits' memory needs "
            "linear_head_on_chip(vocab) and rows that begin at multiples of 16 bytes");
      }
      read_only();
      launch_gradient<kGradient, float, Out>(
          {logits, token_ids, mask, row_stats, logprobs, entropy, nullptr, nullptr, out,
           entropy_out, rows, vocab, 0, map},
          stream);
    });
  });
  check_launch("linear_head");
}

void linear_head_gradient(Rows logits, const int64_t* token_ids, const bool* mask, int64_t begin,
                          int64_t rows, int64_t columns, const float* row_stats,
                          const float* logprobs, const float* entropy, const float* dlogprobs,
                          const float* dentropy, float inv_temperature, float softcap, Rows out,
                          void* stream) {
  require_float32(logits);
  const GradientArguments arguments{
      logits,   token_ids, mask, row_stats, logprobs, entropy, dlogprobs,
      dentropy, out,       {},   rows,      columns,  begin,   {inv_temperature, softcap}};
  dispatch_dtype(out.dtype, "linear_head", [&](auto tag) {
    using Out = decltype(tag);
    if (dentropy == nullptr) {
      launch_gradient<Gradient::logprob, float, Out>(arguments, stream);
    } else {
      launch_gradient<Gradient::combined, float, Out>(arguments, stream);
    }
  });
  check_launch("linear_head");
}

}  // namespace fastrl::cuda
