// The kernels for Any processor: GCC and clang vector extensions of 16 bytes.
#include <cstddef>
#include <cstdint>
#include "../engine/engine.h"

#define DYNOPS_ISA_NAME "portable"
namespace dynops::cpu::portable {
#include "kernels.inc.h"
}  // namespace dynops::cpu::portable
