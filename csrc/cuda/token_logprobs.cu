// Log-prob (entropy, arg max) of given tokens from logits: one read forward, one read and one write
// backward.
#include "ops.h"
#include "softmax_gradient.cuh"

namespace fastrl::cuda {
namespace {

// A row of many tiles is split over blocks where whole rows would leave processors idle, at once or
// while the last ones finish: a large GPU takes about 600 blocks at a time.
constexpr int64_t kFewRows = 1024;

template <bool kSoftcap, bool kMean, typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    token_logprobs_kernel(Rows logits, const int64_t* token_ids, const bool* mask, int64_t rows,
                          int64_t vocab, LogitMap map, RowOutputs out) {
  __shared__ Partial slots[kSlots];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (mask != nullptr && !mask[row]) {
      if (threadIdx.x == 0) out.write(row, RowResult{});
      continue;
    }
    const T* x = row_pointer<const T>(logits, row);
    const Target target = read_target(x, token_ids[row], vocab, out.top1 != nullptr);
    const Partial slot = slot_partial<kSoftcap, kMean>(x, vocab, target, map);
    if (lane_index() == 0) slots[warp_index()] = slot;
    __syncthreads();
    if (threadIdx.x == 0) {
      const float logit = target.capped<kSoftcap>(vocab, map);
      out.write(row, finish_row(combine_slots(slots, map.scale()), logit, map));
    }
    __syncthreads();
  }
}

// One tile a warp; `partials` (rows, pieces, slots).
template <bool kSoftcap, bool kMean, typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    token_logprobs_pieces_kernel(Rows logits, const int64_t* token_ids, const bool* mask,
                                 int64_t vocab, int pieces, LogitMap map, bool with_top1,
                                 Partial* partials) {
  const int64_t row = blockIdx.x / pieces;
  if (mask != nullptr && !mask[row]) return;
  const int tile = static_cast<int>(blockIdx.x % pieces) * kSlots + warp_index();
  Partial part = no_columns();
  if (tile < tiles_of<T>(vocab)) {
    Words<T> packs[kTilePacks];
    const T* x = row_pointer<const T>(logits, row);
    load_tile(x, tile, vocab, packs);
    Target target{token_ids[row], 0.0f, false};
    if (with_top1) target = read_target(x, target.id, vocab, true);
    part = tile_partial<kSoftcap, kMean>(packs, tile, target, map);
  }
  if (lane_index() == 0) {
    partials[static_cast<int64_t>(blockIdx.x) * kSlots + warp_index()] = part;
  }
}

// A block of one warp for each row.
template <bool kSoftcap, typename T>
__global__ void token_logprobs_combine_kernel(Rows logits, const int64_t* token_ids,
                                              const bool* mask, int64_t vocab, int pieces,
                                              LogitMap map, const Partial* partials,
                                              RowOutputs out) {
  __shared__ Partial slots[kSlots];
  const int64_t row = blockIdx.x;
  const int slot = lane_index();
  if (mask != nullptr && !mask[row]) {
    if (slot == 0) out.write(row, RowResult{});
    return;
  }
  if (slot < kSlots) {
    Partial total = no_columns();
    for (int64_t piece = 0; piece < pieces; ++piece) {
      total = combine(total, partials[(row * pieces + piece) * kSlots + slot], map.scale());
    }
    slots[slot] = total;
  }
  __syncthreads();
  if (slot == 0) {
    const T* x = row_pointer<const T>(logits, row);
    const Target target = read_target(x, token_ids[row], vocab, out.top1 != nullptr);
    const float logit = target.capped<kSoftcap>(vocab, map);
    out.write(row, finish_row(combine_slots(slots, map.scale()), logit, map));
  }
}

}  // namespace

int64_t token_logprobs_workspace(int64_t rows, int64_t vocab, int dtype) {
  return dispatch_dtype(dtype, "token_logprobs", [&](auto tag) -> int64_t {
    const int64_t pieces = pieces_of<decltype(tag)>(vocab);
    const bool split = pieces > 1 && rows < kFewRows;
    return split ? rows * pieces * kSlots * static_cast<int64_t>(sizeof(Partial)) : 0;
  });
}

void token_logprobs_fwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap, float* logprobs,
                        float* row_stats, float* entropy, bool* top1, void* workspace,
                        void* stream) {
  if (rows == 0) return;
  const LogitMap map{inv_temperature, softcap};
  const RowOutputs out{logprobs, row_stats, entropy, top1};
  dispatch_dtype(logits.dtype, "token_logprobs", [&](auto tag) {
    using T = decltype(tag);
    dispatch_flags(softcap > 0, entropy != nullptr, [&](auto cap, auto mean) {
      if (workspace == nullptr) {
        const auto kernel = token_logprobs_kernel<cap.value, mean.value, T>;
        FASTRL_LAUNCH(kernel, grid_of(rows), kRowThreads, 0, stream, logits, token_ids, mask, rows,
                      vocab, map, out);
        return;
      }
      const int pieces = pieces_of<T>(vocab);
      Partial* partials = static_cast<Partial*>(workspace);
      const auto first = token_logprobs_pieces_kernel<cap.value, mean.value, T>;
      FASTRL_LAUNCH(first, static_cast<unsigned>(rows * pieces), kRowThreads, 0, stream, logits,
                    token_ids, mask, vocab, pieces, map, top1 != nullptr, partials);
      const auto second = token_logprobs_combine_kernel<cap.value, T>;
      FASTRL_LAUNCH(second, static_cast<unsigned>(rows), kWarp, 0, stream, logits, token_ids, mask,
                    vocab, pieces, map, partials, out);
    });
  });
  check_launch("token_logprobs");
}

void token_logprobs_bwd(int64_t rows, int64_t vocab, Rows logits, const int64_t* token_ids,
                        const bool* mask, float inv_temperature, float softcap,
                        const float* row_stats, const float* logprobs, const float* entropy,
                        const float* dlogprobs, const float* dentropy, Rows dlogits, void* stream) {
  dispatch_dtype(logits.dtype, "token_logprobs", [&](auto tag) {
    using T = decltype(tag);
    const GradientArguments arguments{
        logits,   token_ids, mask, row_stats, logprobs, entropy, dlogprobs,
        dentropy, dlogits,   {},   rows,      vocab,    0,       {inv_temperature, softcap}};
    if (dentropy == nullptr) {
      launch_gradient<Gradient::logprob, T, T>(arguments, stream);
    } else {
      launch_gradient<Gradient::combined, T, T>(arguments, stream);
    }
  });
  check_launch("token_logprobs");
}

}  // namespace fastrl::cuda
