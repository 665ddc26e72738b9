// Queries about the CUDA part that `fastrl doctor` prints. cudart is linked statically, so they
// answer without a driver.
#include <cuda_runtime.h>

#include "device.h"

namespace fastrl::cuda {
namespace {

__global__ void probe_kernel() {}

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

const char* probe() {
  probe_kernel<<<1, 1>>>();
  const cudaError_t launched = cudaGetLastError();
  return cudaGetErrorString(launched == cudaSuccess ? cudaDeviceSynchronize() : launched);
}

}  // namespace fastrl::cuda
