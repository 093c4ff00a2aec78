// Chooses the instruction set once: the best of this machine, or what DYNOPS_CPU_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "engine.h"

namespace dynops::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

struct Isa {
  const Kernels* kernels;
  bool present;
};

// Best first.
const Isa* all_isas(int& size) {
#if defined(__x86_64__)
  static const bool f16c_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has512 = f16c_avx2 && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has512 && __builtin_cpu_supports("avx512bf16");
  static const Isa isas[] = {{&avx512_bf16::table, has_bf16},
                             {&avx512::table, has512},
                             {&avx2::table, f16c_avx2},
                             {&portable::table, true}};
#else
  static const Isa isas[] = {{&portable::table, true}};
#endif
  size = int(sizeof(isas) / sizeof(isas[0]));
  return isas;
}

const Kernels& choose() {
  int size;
  const Isa* isas = all_isas(size);
  const char* wanted = std::getenv("DYNOPS_CPU_ISA");
  std::string names;
  for (int i = 0; i < size; ++i) {
    if (!isas[i].present) continue;
    if (!wanted || !*wanted || !std::strcmp(wanted, isas[i].kernels->name)) return *isas[i].kernels;
    names += std::string(names.empty() ? "" : ", ") + isas[i].kernels->name;
  }
  throw std::runtime_error("DYNOPS_CPU_ISA: expected one of " + names + " on this machine, got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* const* available_isas() {
  static const char* names[8] = {};
  int size, used = 0;
  const Isa* isas = all_isas(size);
  for (int i = 0; i < size; ++i) {
    if (isas[i].present) names[used++] = isas[i].kernels->name;
  }
  return names;
}

}  // namespace dynops::cpu
