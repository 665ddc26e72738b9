// fastrl._C.cuda, compiled for the host: see host_cuda.h.
#include "cuda/bindings.h"

PYBIND11_MODULE(host_cuda_kernels, m) { fastrl::cuda::bind(m); }
