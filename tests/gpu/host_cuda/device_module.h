// What tests choose and learn of the machine.
#pragma once

#include <pybind11/stl.h>

#include "checks.h"
#include "machine.h"

namespace host_cuda {

inline void bind_device(pybind11::module_& m) {
  auto device = m.def_submodule("device", "The device that the kernels believe they run on.");
  device.def("set_limits", [](size_t shared, bool clusters) {
    shared_limit = shared;
    has_clusters = clusters;
  });
  device.def("take_launches", [] { return std::exchange(launches, {}); });
  device.def("set_static_shared", &set_static_shared);
  device.def("allow", &allow);
  device.def("take_reports", &take_reports);
}

}  // namespace host_cuda
