// Python's integers and tuples as the pointers and rows of C++; shared by the two binding files.
#pragma once

#include <pybind11/pybind11.h>

#include "rows.h"

namespace fastrl {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype code, inner, outer stride, inner stride), as ops/backend.py's rows() makes it.
inline Rows rows_of(const pybind11::tuple& t) {
  return {pointer<void>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

}  // namespace fastrl
