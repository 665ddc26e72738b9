// fastrl._C.cuda, compiled for the host: see host_cuda.h.
#include "cuda/bindings.h"
#include "host_cuda.h"

PYBIND11_MODULE(host_cuda_kernels, m) {
  fastrl::cuda::bind(m);
  auto device = m.def_submodule("device", "The device that the kernels believe they run on.");
  device.def("set_limits", [](size_t shared_bytes, bool clusters) {
    host_cuda::shared_limit = shared_bytes;
    host_cuda::has_clusters = clusters;
  });
}
