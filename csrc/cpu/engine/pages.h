// Memory that was just allocated.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dynops::cpu {

// Asks for huge pages under an output that is about to be written whole. Memory of this size comes fresh from
// the system at every call. 256 MB in 65,536 faults took 89 ms to fill, in 128 faults 20.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = 2 << 20, kLeast = 4 * kHuge;
  if (bytes < kLeast) return;
  const intptr_t first = (reinterpret_cast<intptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const intptr_t last = (reinterpret_cast<intptr_t>(data) + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // may refuse: then as it was
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace dynops::cpu
