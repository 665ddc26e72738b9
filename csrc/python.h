// Python's arguments as the parameters of kernels, read as the C++ types of the parameters ask for:
//   T*     None (null) or a tensor, which is whatever has data_ptr(): no torch header is needed
//   void*  an integer as well: a stream
//   Rows   None (data == nullptr), or the tuple that row_layout of fastrl/ops/native.py makes
// Numbers are pybind11's own. The GIL is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/isa.h"
#include "rows.h"

namespace fastrl {

template <typename T>
struct Address {
  T* value = nullptr;
  operator T*() const { return value; }
};

// The address of a tensor's first element. One that has elements but no memory is refused.
inline void* address_of(PyObject* tensor) {
  if (tensor == Py_None) return nullptr;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto number = pybind11::reinterpret_steal<pybind11::object>(
      PyObject_CallMethodObjArgs(tensor, data_ptr, nullptr));
  void* address = number ? PyLong_AsVoidPtr(number.ptr()) : nullptr;
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  if (address == nullptr) {
    const auto elements = pybind11::handle(tensor).attr("numel")().cast<int64_t>();
    if (elements > 0) {
      throw std::runtime_error(std::string("fastrl: expected tensors with memory, got a ") +
                               Py_TYPE(tensor)->tp_name + " of " + std::to_string(elements));
    }
  }
  return address;
}

inline Rows rows_of(pybind11::handle object) {
  if (object.is_none()) return {nullptr, 0, 1, 0, 0};
  const auto layout = pybind11::cast<pybind11::tuple>(object);
  const auto number = [&](size_t i) { return layout[i].cast<int64_t>(); };
  return {address_of(layout[0].ptr()), static_cast<int>(number(1)), number(2), number(3),
          number(4)};
}

template <typename T>
struct Argument {
  using type = T;
};
template <typename T>
struct Argument<T*> {
  using type = Address<T>;
};

// `function` as Python calls it.
template <typename... P>
auto kernel(void (*function)(P...)) {
  return [function](typename Argument<P>::type... arguments) {
    pybind11::gil_scoped_release release;
    function(arguments...);
  };
}

// The same of a function's versions in the order of Isa, of which the active one runs.
template <typename... P, typename... Versions>
auto kernel(void (*baseline)(P...), Versions... better) {
  const std::array<void (*)(P...), 1 + sizeof...(better)> versions{baseline, better...};
  return [versions](typename Argument<P>::type... arguments) {
    const auto function = versions[static_cast<size_t>(cpu::active_isa())];
    pybind11::gil_scoped_release release;
    function(arguments...);
  };
}

}  // namespace fastrl

namespace pybind11::detail {

template <typename T>
struct type_caster<fastrl::Address<T>> {
  PYBIND11_TYPE_CASTER(fastrl::Address<T>, const_name("Tensor | None"));
  bool load(handle source, bool) {
    const bool is_number = std::is_same_v<T, void> && PyLong_Check(source.ptr());
    void* address = is_number ? PyLong_AsVoidPtr(source.ptr()) : fastrl::address_of(source.ptr());
    value.value = static_cast<T*>(address);
    return true;
  }
};

template <>
struct type_caster<fastrl::Rows> {
  PYBIND11_TYPE_CASTER(fastrl::Rows, const_name("Rows | None"));
  bool load(handle source, bool) {
    value = fastrl::rows_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
