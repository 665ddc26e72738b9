// Host-side checks. A failure becomes a Python ValueError that names op, argument, expected and
// got.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastrl {

inline void check_size(bool ok, const char* op, const char* argument, const char* expected,
                       int64_t got) {
  if (!ok) {
    throw std::invalid_argument(std::string(op) + ": " + argument + ": expected " + expected +
                                ", got " + std::to_string(got));
  }
}

// Kernels report the first row whose token id is out of range; -1 means none.
inline void check_token_ids(int64_t bad_row, const char* op, int64_t vocab,
                            const int64_t* token_ids) {
  if (bad_row >= 0) {
    throw std::invalid_argument(std::string(op) + ": token_ids: expected ids in [0, " +
                                std::to_string(vocab) + "), got " +
                                std::to_string(token_ids[bad_row]) + " at flat position " +
                                std::to_string(bad_row) + "; mask positions that hold no token");
  }
}

}  // namespace fastrl
