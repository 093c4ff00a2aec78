// The kernels for any processor: GCC and clang vector extensions of 16 bytes.
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../engine/engine.h"

#define DYNOPS_ISA_NAME "portable"
namespace dynops::cpu::portable {
#include "kernels.inc.h"
}  // namespace dynops::cpu::portable
