// Tells whether memory was written, without reading all of it.
#pragma once

#include <cstdint>

namespace dynops::cpu {

// Memory of at most this many bytes is hashed whole: 0.5 us in the cache.
constexpr int64_t kWholeBytes = 16 << 10;

// A hash of `bytes` at `from`, of all of them where they are few or `lines` is 0. Else it is of about `lines`
// cache lines: the first, the last, and one in each of `lines` equal parts, at a fixed pseudo-random place.
// Equal memory has equal hashes on one machine; one changed word that is read always changes the hash.
uint64_t fingerprint(const void* from, int64_t bytes, int64_t lines);

}  // namespace dynops::cpu
