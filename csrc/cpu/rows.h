#pragma once

#include <cstdint>

namespace dynops::cpu {

// What lies under the rows that are computed.
struct Background {
  char* out;
  const char* base;  // null: zeros
  int64_t bytes;     // of a pixel
  const int32_t* index;
  int64_t rows;

  // Fills those pixels of [begin, end) that are not in the index, and touches no other.
  void fill_inactive(int64_t begin, int64_t end) const;
  // As much, before the rows among them are written: where few are, everything is zeroed in one go.
  void fill_before(int64_t begin, int64_t end) const;
};

}  // namespace dynops::cpu
