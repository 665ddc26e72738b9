// Queries about the CUDA part of the build; free of CUDA headers.
#pragma once

namespace fastrl::cuda {

int runtime_version();  // of the cudart linked in, as 13000 for 13.0
int driver_version();   // 0 without a driver
int device_count();     // 0 without a driver

// Launches a kernel that does nothing on the current device and waits for it; CUDA's words on the
// outcome ("no error" if it went well).
const char* probe();

}  // namespace fastrl::cuda
