// The extension module dynops._C. The ops themselves register through libtorch's stable ABI, in the
// files beside; Python sees what the binary was built with, and a hash of memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/engine/engine.h"
#include "cpu/fingerprint.h"
#include "dynops_build.h"  // setup.py writes it

namespace py = pybind11;

// libstdc++ since GCC 11 reads this variable of glibc 2.32 to save atomics where there is one thread. One of
// our own, hidden and always false, lets the binary load with the older glibc that torch itself supports.
extern "C" {
char __libc_single_threaded = 0;
}

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

// fingerprint(address, bytes, lines, …): one hash of several pieces of memory. A plain C function: pybind11's
// would take three times as long, and layers call this once or twice in every call.
static PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count % 3) {
    PyErr_Format(PyExc_TypeError, "fingerprint: expected address, bytes, lines, ..., got %zd arguments",
                 count);
    return nullptr;
  }
  uint64_t hash = 0;
  for (Py_ssize_t i = 0; i < count; i += 3) {
    const void* from = PyLong_AsVoidPtr(arguments[i]);
    const long long bytes = PyLong_AsLongLong(arguments[i + 1]), lines = PyLong_AsLongLong(arguments[i + 2]);
    if (PyErr_Occurred()) return nullptr;
    hash = hash * 31 + dynops::cpu::fingerprint(from, from ? bytes : 0, lines);
  }
  return PyLong_FromUnsignedLongLong(hash);
}

static PyMethodDef fingerprint_method = {
    "fingerprint", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fingerprint)), METH_FASTCALL,
    "A hash of memory: fingerprint(address, bytes, lines, ...), see csrc/cpu/fingerprint.h."};

PYBIND11_MODULE(_C, m) {
  m.doc() = "The binary of dynops.";
  m.attr("fingerprint") = py::reinterpret_steal<py::object>(PyCFunction_New(&fingerprint_method, nullptr));
  m.def("build_info", &build_info, "What the binary was built with, and what it runs on.");
}
