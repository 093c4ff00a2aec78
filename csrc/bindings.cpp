// The extension module dynops._C. The ops themselves register through libtorch's stable ABI, in the
// files beside; Python sees what the binary was built with, and a hash of memory.
#include <Python.h>

#include <exception>

#include "calls.h"
#include "cpu/engine/engine.h"
#include "cpu/fingerprint.h"
#include "dynops_build.h"  // setup.py writes it

// All of Python that is used here. A C++ program without Python loads the binary for its ops, and finds none
// of it.
#pragma weak PyBool_FromLong
#pragma weak PyErr_Format
#pragma weak PyErr_Occurred
#pragma weak PyErr_SetString
#pragma weak PyExc_RuntimeError
#pragma weak PyExc_TypeError
#pragma weak PyList_Append
#pragma weak PyList_New
#pragma weak PyLong_AsLongLong
#pragma weak PyLong_AsVoidPtr
#pragma weak PyLong_FromUnsignedLongLong
#pragma weak PyModule_Create2
#pragma weak PyUnicode_FromString
#pragma weak Py_BuildValue
#pragma weak _Py_Dealloc

// libstdc++ since GCC 11 reads this variable of glibc 2.32 to save atomics where there is one thread. One of
// our own, hidden and always false, lets the binary load with the older glibc that torch itself supports.
extern "C" {
char __libc_single_threaded = 0;
}

static PyObject* build_info(PyObject*, PyObject*) {
  try {
    dynops::cpu::kernels();  // throws where the environment names an instruction set that is not there
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
  PyObject* isas = PyList_New(0);
  for (const char* const* name = dynops::cpu::available_isas(); isas && *name; ++name) {
    PyObject* text = PyUnicode_FromString(*name);
    if (!text || PyList_Append(isas, text)) return nullptr;
    Py_DECREF(text);
  }
  if (!isas) return nullptr;
  return Py_BuildValue("{s:s,s:s,s:s,s:N,s:s,s:N,s:s}", "version", DYNOPS_VERSION, "torch",
                       DYNOPS_TORCH_VERSION, "compiler", __VERSION__, "cpu_isas", isas, "cpu_isa",
                       dynops::cpu::kernels().name, "bf16_dot",
                       PyBool_FromLong(dynops::cpu::kernels().bf16_dot), "cuda_archs", DYNOPS_CUDA_ARCHS);
}

// fingerprint(address, bytes, lines, …): one hash of several pieces of memory. Layers call this once or twice
// in every call.
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

static PyMethodDef methods[] = {
    {"build_info", &build_info, METH_NOARGS, "What the binary was built with, and what it runs on."},
    {"fingerprint", dynops::fast_call(&fingerprint), METH_FASTCALL,
     "A hash of memory: fingerprint(address, bytes, lines, ...), see csrc/cpu/fingerprint.h."},
    {"prepare_conv", dynops::fast_call(&dynops::prepare_conv), METH_FASTCALL, "See csrc/calls.h."},
    {"run_conv", dynops::fast_call(&dynops::run_conv), METH_FASTCALL, "See csrc/calls.h."},
    {"make_sequence", dynops::fast_call(&dynops::make_sequence), METH_FASTCALL, "See csrc/calls.h."},
    {"run_sequence", dynops::fast_call(&dynops::run_sequence), METH_FASTCALL, "See csrc/calls.h."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The binary of dynops.", -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create2(&module, PYTHON_API_VERSION); }
