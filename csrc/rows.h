// Rows of a tensor with any leading strides and a contiguous last dimension.
#pragma once

#include <cstdint>

namespace fastrl {

struct Rows {
  void* data;
  int dtype;             // DType
  int64_t inner;         // rows per step of the outer stride
  int64_t outer_stride;  // in elements
  int64_t inner_stride;  // in elements

  template <typename T>
  T* row(int64_t index) const {
    return static_cast<T*>(data) + (index / inner) * outer_stride + (index % inner) * inner_stride;
  }
};

}  // namespace fastrl
