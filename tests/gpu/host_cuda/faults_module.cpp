#include "device_module.h"
#include "faults.h"

PYBIND11_MODULE(host_cuda_faults, m) {
  m.def("run_fault", &fastrl::cuda::run_fault);
  host_cuda::bind_device(m);
}
