#pragma once

#include <cstdint>
#include <string>

namespace fastrl::cuda {

// Launches the kernel of that name on so many blocks, with the float array at `address`.
void run_fault(const std::string& name, uintptr_t address, int64_t argument, int blocks);

}  // namespace fastrl::cuda
