// Every function of fastrl._C.cuda. As in ../bindings.cpp, with the stream in place of the thread
// count.

#include "bindings.h"

#include "../pointers.h"
#include "ops.h"

namespace py = pybind11;

namespace fastrl::cuda {
namespace {

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

void bind(py::module_& m) { bind_lora_linear(m); }

}  // namespace fastrl::cuda
