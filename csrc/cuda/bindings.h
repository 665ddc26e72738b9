// The functions of fastrl._C.cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrl::cuda {

void bind(pybind11::module_& m);

}  // namespace fastrl::cuda
