#pragma once

#include <cstdint>

namespace dynops::cpu {

// Fills those pixels of [begin, end) that are not in the ascending `index`: from `base`, or with zero
// where it is null, past the caches if `stream`. Nothing that is computed is written twice.
void fill_inactive(char* out, const char* base, int64_t bytes, const int32_t* index, int64_t rows,
                   int64_t begin, int64_t end, bool stream);

}  // namespace dynops::cpu
