// Every function of fastrl._C.cuda. As in ../bindings.cpp, with the stream in place of the thread
// count.

#include "bindings.h"

#include "../pointers.h"
#include "ops.h"

namespace py = pybind11;

namespace fastrl::cuda {
namespace {

void bind_gae(py::module_& m) {
  m.def(
      "gae",
      [](uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t dones, uintptr_t lambdas,
         uintptr_t bootstrap_value, int64_t rows, int64_t steps, float gamma, float gae_lambda,
         uintptr_t advantages, uintptr_t returns, uintptr_t stream) {
        gae(pointer<const float>(rewards), pointer<const float>(values), pointer<const bool>(mask),
            pointer<const bool>(dones), pointer<const float>(lambdas),
            pointer<const float>(bootstrap_value), rows, steps, gamma, gae_lambda,
            pointer<float>(advantages), pointer<float>(returns), pointer<void>(stream));
      },
      py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("dones"), py::arg("lambdas"),
      py::arg("bootstrap_value"), py::arg("rows"), py::arg("steps"), py::arg("gamma"),
      py::arg("gae_lambda"), py::arg("advantages"), py::arg("returns"), py::arg("stream"),
      "Advantages and returns of contiguous (rows, steps) float32 arrays; mask, dones, lambdas and "
      "bootstrap_value may be absent (0).");
}

void bind_lora_linear(py::module_& m) {
  m.def(
      "lora_dropout",
      [](uintptr_t matrix, int dtype, int64_t rows, int64_t cols, uintptr_t seed,
         uint32_t threshold, uintptr_t stream) {
        lora_dropout(pointer<void>(matrix), dtype, rows, cols, pointer<const int64_t>(seed),
                     threshold, pointer<void>(stream));
      },
      py::arg("matrix"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("seed"),
      py::arg("threshold"), py::arg("stream"),
      "Zeroes, in place, the elements of a contiguous matrix whose Philox word is below threshold; "
      "the seed is read from its address.");
}

}  // namespace

void bind(py::module_& m) {
  bind_gae(m);
  bind_lora_linear(m);
}

}  // namespace fastrl::cuda
