// Every function of fastrl._C. Pointers and streams come in as integers: the module includes no
// torch header. Python (fastrl/ops) has validated shapes and allocated the outputs; the GIL is
// released while kernels run.

#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "memory.h"

#define FASTRL_ISA baseline
#include "ops.h"
#undef FASTRL_ISA
#if defined(__x86_64__)
#define FASTRL_ISA avx2
#include "ops.h"
#undef FASTRL_ISA
#define FASTRL_ISA avx512
#include "ops.h"
#undef FASTRL_ISA
#endif

#ifdef FASTRL_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace fastrl;
using fastrl::cpu::active_isa;
using fastrl::cpu::Isa;

namespace {

// Calls cpu::<isa>::op(...) for the instruction set in use.
#if defined(__x86_64__)
#define FASTRL_CALL(op, ...)                                  \
  (active_isa() == Isa::avx512 ? cpu::avx512::op(__VA_ARGS__) \
   : active_isa() == Isa::avx2 ? cpu::avx2::op(__VA_ARGS__)   \
                               : cpu::baseline::op(__VA_ARGS__))
#else
#define FASTRL_CALL(op, ...) cpu::baseline::op(__VA_ARGS__)
#endif

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype code, inner, outer stride, inner stride), as ops/backend.py's rows() makes it.
Rows rows_of(const py::tuple& t) {
  return {pointer<void>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

void linear_head_begin(const py::tuple& x, const py::tuple& targets, int64_t rows, int64_t width,
                       float softcap, uintptr_t sweeps, int threads) {
  Rows x_rows = rows_of(x), targets_rows = rows_of(targets);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_begin, x_rows, targets_rows, rows, width, softcap, pointer<float>(sweeps),
              threads);
}

void linear_head_sweep(const py::tuple& logits, uintptr_t token_ids, int64_t begin, int64_t rows,
                       int64_t columns, float inv_temperature, float softcap, bool with_entropy,
                       bool write, const py::tuple& products, uintptr_t sweeps, int threads) {
  Rows logits_rows = rows_of(logits), products_rows = rows_of(products);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_sweep, logits_rows, pointer<const int64_t>(token_ids), begin, rows,
              columns, inv_temperature, softcap, with_entropy, write, products_rows,
              pointer<float>(sweeps), threads);
}

void linear_head_fold(const py::tuple& block, const py::tuple& product_block, uintptr_t sweeps,
                      int64_t rows, int64_t width, uintptr_t sums, uintptr_t weighted,
                      int threads) {
  Rows block_rows = rows_of(block), product_block_rows = rows_of(product_block);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_fold, block_rows, product_block_rows, pointer<const float>(sweeps), rows,
              width, pointer<float>(sums), pointer<float>(weighted), threads);
}

void linear_head_finish(uintptr_t sweeps, int64_t rows, float inv_temperature, float softcap,
                        uintptr_t logprobs, uintptr_t row_stats, uintptr_t entropy,
                        uintptr_t coefficients, uintptr_t entropy_coefficients) {
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_finish, pointer<const float>(sweeps), rows, inv_temperature, softcap,
              pointer<float>(logprobs), pointer<float>(row_stats), pointer<float>(entropy),
              pointer<float>(coefficients), pointer<float>(entropy_coefficients));
}

void linear_head_direction(const py::tuple& targets, uintptr_t sums, uintptr_t weighted,
                           uintptr_t coefficients, int64_t rows, int64_t width, uintptr_t out,
                           int threads) {
  Rows targets_rows = rows_of(targets);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_direction, targets_rows, pointer<const float>(sums),
              pointer<const float>(weighted), pointer<const float>(coefficients), rows, width,
              pointer<float>(out), threads);
}

void linear_head_gradient(const py::tuple& logits, uintptr_t token_ids, int64_t begin, int64_t rows,
                          int64_t columns, uintptr_t row_stats, uintptr_t logprobs,
                          uintptr_t entropy, uintptr_t dlogprobs, uintptr_t dentropy,
                          float inv_temperature, float softcap, int threads) {
  Rows logits_rows = rows_of(logits);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_gradient, logits_rows, pointer<const int64_t>(token_ids), begin, rows,
              columns, pointer<const float>(row_stats), pointer<const float>(logprobs),
              pointer<const float>(entropy), pointer<const float>(dlogprobs),
              pointer<const float>(dentropy), inv_temperature, softcap, threads);
}

void linear_head_scale(const py::tuple& direction, const py::tuple& entropy_direction,
                       uintptr_t mask, uintptr_t dlogprobs, uintptr_t dentropy, int64_t rows,
                       int64_t width, const py::tuple& dhidden, int threads) {
  Rows direction_rows = rows_of(direction), entropy_direction_rows = rows_of(entropy_direction),
       dhidden_rows = rows_of(dhidden);
  py::gil_scoped_release release;
  FASTRL_CALL(linear_head_scale, direction_rows, entropy_direction_rows, pointer<const bool>(mask),
              pointer<const float>(dlogprobs), pointer<const float>(dentropy), rows, width,
              dhidden_rows, threads);
}

void lora_dropout(uintptr_t matrix, int dtype, int64_t rows, int64_t cols, uintptr_t seed,
                  uint32_t threshold, int threads) {
  py::gil_scoped_release release;
  FASTRL_CALL(lora_dropout, pointer<void>(matrix), dtype, rows, cols, pointer<const int64_t>(seed),
              threshold, threads);
}

void token_logprobs_fwd(const py::tuple& logits, uintptr_t token_ids, uintptr_t mask, int64_t rows,
                        int64_t vocab, float inv_temperature, float softcap, uintptr_t logprobs,
                        uintptr_t row_stats, uintptr_t entropy, int threads) {
  Rows logits_rows = rows_of(logits);
  py::gil_scoped_release release;
  FASTRL_CALL(token_logprobs_fwd, logits_rows, pointer<const int64_t>(token_ids),
              pointer<const bool>(mask), rows, vocab, inv_temperature, softcap,
              pointer<float>(logprobs), pointer<float>(row_stats), pointer<float>(entropy),
              threads);
}

void token_logprobs_bwd(const py::tuple& logits, uintptr_t token_ids, uintptr_t mask,
                        uintptr_t row_stats, uintptr_t logprobs, uintptr_t entropy,
                        uintptr_t dlogprobs, uintptr_t dentropy, int64_t rows, int64_t vocab,
                        float inv_temperature, float softcap, const py::tuple& dlogits,
                        int threads) {
  Rows logits_rows = rows_of(logits), dlogits_rows = rows_of(dlogits);
  py::gil_scoped_release release;
  FASTRL_CALL(token_logprobs_bwd, logits_rows, pointer<const int64_t>(token_ids),
              pointer<const bool>(mask), pointer<const float>(row_stats),
              pointer<const float>(logprobs), pointer<const float>(entropy),
              pointer<const float>(dlogprobs), pointer<const float>(dentropy), rows, vocab,
              inv_temperature, softcap, dlogits_rows, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastrl: raw addresses in, results written in place.";

  m.def(
      "cpu_isa", [] { return cpu::isa_name(active_isa()); },
      "Instruction set in use: avx512, avx2 or baseline (FASTRL_CPU_ISA forces one).");
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, int64_t bytes) { advise_huge_pages(pointer<void>(data), bytes); },
      py::arg("data"), py::arg("bytes"), "Asks for huge pages under a fresh large buffer.");
#ifdef FASTRL_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_runtime_version", &cuda::runtime_version,
        "Version of the linked cudart, 13000 = 13.0.");
  m.def("cuda_driver_version", &cuda::driver_version, "Version of the driver; 0 if there is none.");
  m.def("cuda_device_count", &cuda::device_count, "Number of CUDA devices; 0 without a driver.");
#else
  m.attr("has_cuda") = false;
#endif

  m.def("linear_head_begin", &linear_head_begin, py::arg("x"), py::arg("targets"), py::arg("rows"),
        py::arg("width"), py::arg("softcap"), py::arg("sweeps"), py::arg("threads"),
        "The target's logit of each row, in fp32, and the start of its sweep over the vocabulary.");
  m.def("linear_head_sweep", &linear_head_sweep, py::arg("logits"), py::arg("token_ids"),
        py::arg("begin"), py::arg("rows"), py::arg("columns"), py::arg("inv_temperature"),
        py::arg("softcap"), py::arg("with_entropy"), py::arg("write"), py::arg("products"),
        py::arg("sweeps"), py::arg("threads"),
        "One block of logits: updates each row's sums; if write, logits become exponentials in "
        "place.");
  m.def(
      "linear_head_fold", &linear_head_fold, py::arg("block"), py::arg("product_block"),
      py::arg("sweeps"), py::arg("rows"), py::arg("width"), py::arg("sums"), py::arg("weighted"),
      py::arg("threads"),
      "Adds a block's products with the weight to the running sums, rescaled to the new maximum.");
  m.def(
      "linear_head_finish", &linear_head_finish, py::arg("sweeps"), py::arg("rows"),
      py::arg("inv_temperature"), py::arg("softcap"), py::arg("logprobs"), py::arg("row_stats"),
      py::arg("entropy"), py::arg("coefficients"), py::arg("entropy_coefficients"),
      "Log-prob, (max, log-sum) and entropy of each row, and the coefficients of its directions.");
  m.def("linear_head_direction", &linear_head_direction, py::arg("targets"), py::arg("sums"),
        py::arg("weighted"), py::arg("coefficients"), py::arg("rows"), py::arg("width"),
        py::arg("out"), py::arg("threads"),
        "Gradient of log-prob or entropy with respect to the hidden state; out may be an input.");
  m.def("linear_head_gradient", &linear_head_gradient, py::arg("logits"), py::arg("token_ids"),
        py::arg("begin"), py::arg("rows"), py::arg("columns"), py::arg("row_stats"),
        py::arg("logprobs"), py::arg("entropy"), py::arg("dlogprobs"), py::arg("dentropy"),
        py::arg("inv_temperature"), py::arg("softcap"), py::arg("threads"),
        "One block of logits becomes its gradient, in place.");
  m.def("linear_head_scale", &linear_head_scale, py::arg("direction"), py::arg("entropy_direction"),
        py::arg("mask"), py::arg("dlogprobs"), py::arg("dentropy"), py::arg("rows"),
        py::arg("width"), py::arg("dhidden"), py::arg("threads"),
        "dhidden = dlogprobs * direction + dentropy * entropy_direction; 0 where masked.");
  m.def(
      "lora_dropout", &lora_dropout, py::arg("matrix"), py::arg("dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("seed"), py::arg("threshold"), py::arg("threads"),
      "Zeroes, in place, the elements of a contiguous matrix whose Philox word is below threshold; "
      "the seed is read from its address.");
  m.def(
      "token_logprobs_fwd", &token_logprobs_fwd, py::arg("logits"), py::arg("token_ids"),
      py::arg("mask"), py::arg("rows"), py::arg("vocab"), py::arg("inv_temperature"),
      py::arg("softcap"), py::arg("logprobs"), py::arg("row_stats"), py::arg("entropy"),
      py::arg("threads"),
      "Log-prob of each token, (max, log-sum) of each row and, if entropy is not 0, its entropy.");
  m.def("token_logprobs_bwd", &token_logprobs_bwd, py::arg("logits"), py::arg("token_ids"),
        py::arg("mask"), py::arg("row_stats"), py::arg("logprobs"), py::arg("entropy"),
        py::arg("dlogprobs"), py::arg("dentropy"), py::arg("rows"), py::arg("vocab"),
        py::arg("inv_temperature"), py::arg("softcap"), py::arg("dlogits"), py::arg("threads"),
        "Gradient of the logits; dlogits may be the logits' own memory.");
}
