// fastrl._C.cuda, compiled for the host: see machine.h.
#include "cuda/bindings.h"
#include "device_module.h"

PYBIND11_MODULE(host_cuda_kernels, m) {
  fastrl::cuda::bind(m);
  host_cuda::bind_device(m);
}
