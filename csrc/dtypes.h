// Element types of the tensors that kernels read and write, and the switch from a run-time code to
// a type.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastrl {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The codes that fastrl/ops/native.py passes.
enum class DType : int { f32 = 0, bf16 = 1, fp16 = 2 };

// Calls body with a value of the element type that `dtype` names: body(bf16{}).
template <typename Body>
auto dispatch_dtype(int dtype, const char* op, Body&& body) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::fp16:
      return body(fp16{});
  }
  throw std::invalid_argument(
      std::string(op) + ": dtype code: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " +
      std::to_string(dtype));
}

// Turns run-time flags into template arguments: body(std::true_type{}, std::false_type{}).
template <typename Body>
void dispatch_flags(bool first, bool second, Body&& body) {
  auto with_second = [&](auto a) {
    second ? body(a, std::true_type{}) : body(a, std::false_type{});
  };
  first ? with_second(std::true_type{}) : with_second(std::false_type{});
}

}  // namespace fastrl
