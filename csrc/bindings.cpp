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
