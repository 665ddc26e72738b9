// Hints to the operating system about large buffers.
#pragma once

#include <cstdint>

namespace fastrl {

// Asks for huge pages under a fresh buffer: its first writes then take one page fault per 2 MiB
// instead of per 4 KiB. Measured on a 131 MB gradient: first touch in 21 ms instead of 140 ms.
// Failure is harmless and not reported.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastrl
