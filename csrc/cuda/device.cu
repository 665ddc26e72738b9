// Queries about the CUDA part that `fastrl doctor` prints. cudart is linked statically, so they
// answer without a driver.
#include <cuda_runtime.h>

#include "device.h"

namespace fastrl::cuda {
namespace {

__global__ void probe_kernel(int* out) { *out = 1; }

}  // namespace

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* probe(void* stream, int* out) {
  probe_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(out);
  return cudaGetErrorString(cudaGetLastError());
}

}  // namespace fastrl::cuda
