// The widest word that a kernel may move memory in.
#pragma once

#include <cstdint>

namespace dynops::cuda {

inline uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Calls f with a null pointer to the widest word, of up to 16 bytes, that divides every number or-ed in
// `all`.
template <class F>
void visit_word(uint64_t all, const F& f) {
  if (all % 16 == 0) return f(static_cast<uint4*>(nullptr));
  if (all % 8 == 0) return f(static_cast<uint64_t*>(nullptr));
  if (all % 4 == 0) return f(static_cast<uint32_t*>(nullptr));
  if (all % 2 == 0) return f(static_cast<uint16_t*>(nullptr));
  return f(static_cast<uint8_t*>(nullptr));
}

}  // namespace dynops::cuda
