// The extension module dynops._C. The ops themselves register through libtorch's stable ABI, in the
// files beside; Python sees only what the binary was built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/engine.h"

#ifndef DYNOPS_CUDA_ARCHS
#define DYNOPS_CUDA_ARCHS ""
#endif

namespace py = pybind11;

static py::dict build_info() {
  std::vector<std::string> isas;
  for (const char* const* name = dynops::cpu::available_isas(); *name; ++name) isas.emplace_back(*name);
  py::dict info;
  info["version"] = DYNOPS_VERSION;
  info["torch"] = DYNOPS_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_isas"] = isas;
  info["cpu_isa"] = dynops::cpu::kernels().name;
  info["bf16_dot"] = dynops::cpu::kernels().bf16_dot;
  info["cuda_archs"] = DYNOPS_CUDA_ARCHS;
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The binary of dynops.";
  m.def("build_info", &build_info, "What the binary was built with, and what it runs on.");
}
