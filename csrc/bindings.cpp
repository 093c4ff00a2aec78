// The extension module dynops._C. The ops themselves register through libtorch's stable ABI, in the
// files beside; Python sees what the binary was built with, and a hash of memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/engine/engine.h"
#include "cpu/fingerprint.h"
#include "cpu/pixels/sequence.h"
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

// Integers of a call, in order; a tensor is its address.
struct Arguments {
  PyObject* const* at;
  int64_t number() { return PyLong_AsLongLong(*at++); }
  template <class T>
  T* address() {
    return static_cast<T*>(PyLong_AsVoidPtr(*at++));
  }
  dynops::Geometry geometry() {
    int64_t g[15];
    for (int64_t& size : g) size = number();
    return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], g[14]};
  }
  dynops::cpu::Values values() {
    const char* data = address<const char>();
    return {data, dynops::cpu::Dtype(number())};
  }
};

using dynops::cpu::PreparedConv;

static void forget_conv(PyObject* capsule) {
  delete static_cast<PreparedConv*>(PyCapsule_GetPointer(capsule, "PreparedConv"));
}

// Runs a kernel while other Python threads go on.
template <class Kernel>
static PyObject* without_gil(const Kernel& kernel) {
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    kernel();
  } catch (const std::exception& e) {
    error = e.what();
  }
  Py_END_ALLOW_THREADS;
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// prepare_conv(15 numbers of a geometry, dtype, in_channels, out_channels, pointwise, winograd,
// activation, weight, and
// address and dtype of bias, scale and shift): what run_conv takes.
static PyObject* prepare_conv(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 28) return PyErr_Format(PyExc_TypeError, "prepare_conv: expected 28 integers, got %zd", count);
  Arguments a{arguments};
  const dynops::Geometry geometry = a.geometry();
  const auto dtype = dynops::cpu::Dtype(a.number());
  const int64_t in_channels = a.number(), out_channels = a.number();
  const bool pointwise = a.number(), winograd = a.number();
  const auto activation = dynops::cpu::Activation(a.number());
  const char* weight = a.address<const char>();
  const auto bias = a.values(), scale = a.values(), shift = a.values();
  if (PyErr_Occurred()) return nullptr;
  auto* made = new PreparedConv(geometry, dtype, in_channels, out_channels, pointwise, winograd, activation,
                                weight, bias, scale, shift);
  return PyCapsule_New(made, "PreparedConv", &forget_conv);
}

// run_conv(prepared, x, index, rows, source, residual, quads, tiles, out): no dispatcher, and no schema of 17
// arguments to match, which take 20 us.
static PyObject* run_conv(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "run_conv: expected 9 arguments, got %zd", count);
  const auto* conv = static_cast<const PreparedConv*>(PyCapsule_GetPointer(arguments[0], "PreparedConv"));
  if (!conv) return nullptr;
  Arguments a{arguments + 1};
  PreparedConv::Call call;
  call.x = a.address<const char>();
  call.index = a.address<const int32_t>();
  call.rows = a.number();
  call.source = a.address<const int32_t>();
  call.residual = a.address<const char>();
  call.quads = a.address<const int32_t>();
  call.tiles = a.number();
  call.out = a.address<char>();
  if (PyErr_Occurred()) return nullptr;
  return without_gil([&] { conv->run(call); });
}

using dynops::cpu::Sequence;

static void forget_sequence(PyObject* capsule) {
  delete static_cast<Sequence*>(PyCapsule_GetPointer(capsule, "Sequence"));
}

// make_sequence([(plan, channels) of each value], inputs, outputs, steps), with a step (kind, inputs, out,
// prepared or None, geometry or None, freed, channels, (gamma, beta, eps)): what run_sequence takes. The
// caller keeps what the steps prepared.
static py::object make_sequence(const std::vector<std::pair<int64_t, int64_t>>& values,
                                const std::vector<int64_t>& inputs, const std::vector<int64_t>& outputs,
                                const std::vector<py::tuple>& steps) {
  auto made = std::make_unique<Sequence>();
  for (const auto& [plan, channels] : values) made->values.push_back({plan, channels});
  made->inputs = inputs;
  made->outputs = outputs;
  for (const py::tuple& step : steps) {
    dynops::cpu::SequenceStep one{.kind = dynops::cpu::StepKind(step[0].cast<int64_t>()),
                                  .inputs = step[1].cast<std::vector<int64_t>>(),
                                  .out = step[2].cast<int64_t>(),
                                  .freed = step[5].cast<std::vector<int64_t>>(),
                                  .channels = step[6].cast<std::vector<int64_t>>()};
    const auto [gamma, beta, eps] = step[7].cast<std::tuple<int64_t, int64_t, double>>();
    one.gamma = reinterpret_cast<const float*>(gamma);
    one.beta = reinterpret_cast<const float*>(beta);
    one.eps = eps;
    if (!step[3].is_none()) {
      one.conv = static_cast<PreparedConv*>(PyCapsule_GetPointer(py::object(step[3]).ptr(), "PreparedConv"));
      if (!one.conv) throw py::error_already_set();
    }
    if (!step[4].is_none()) {
      const py::tuple geometry = step[4];
      std::vector<PyObject*> numbers;
      for (const py::handle size : geometry) numbers.push_back(size.ptr());
      if (numbers.size() != 15) throw py::type_error("make_sequence: expected a geometry of 15 numbers");
      one.g = Arguments{numbers.data()}.geometry();
    }
    made->steps.push_back(std::move(one));
  }
  return py::reinterpret_steal<py::object>(PyCapsule_New(made.release(), "Sequence", &forget_sequence));
}

// run_sequence(sequence, plans, (index, inverse, quads, rows, tiles, pixels) of each, the inputs'
// and the outputs' addresses).
static PyObject* run_sequence(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 2) return PyErr_Format(PyExc_TypeError, "run_sequence: expected 2 arguments or more");
  const auto* sequence = static_cast<const Sequence*>(PyCapsule_GetPointer(arguments[0], "Sequence"));
  if (!sequence) return nullptr;
  const int64_t plans = PyLong_AsLongLong(arguments[1]);
  const auto expected = 2 + 6 * plans + int64_t(sequence->inputs.size() + sequence->outputs.size());
  if (plans < 0 || count != expected) {
    return PyErr_Format(PyExc_TypeError, "run_sequence: expected %lld arguments, got %zd",
                        static_cast<long long>(expected), count);
  }
  Arguments a{arguments + 2};
  std::vector<dynops::cpu::PlanView> views(plans);
  for (auto& view : views) {
    view.index = a.address<const int32_t>();
    view.inverse = a.address<const int32_t>();
    view.quads = a.address<const int32_t>();
    view.rows = a.number();
    view.tiles = a.number();
    view.pixels = a.number();
  }
  std::vector<const char*> from(sequence->inputs.size());
  std::vector<char*> to(sequence->outputs.size());
  for (const char*& address : from) address = a.address<const char>();
  for (char*& address : to) address = a.address<char>();
  if (PyErr_Occurred()) return nullptr;
  return without_gil([&] { sequence->run(views, from, to); });
}

template <class Function>
static PyCFunction fast_call(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

static PyMethodDef methods[] = {
    {"fingerprint", fast_call(&fingerprint), METH_FASTCALL,
     "A hash of memory: fingerprint(address, bytes, lines, ...), see csrc/cpu/fingerprint.h."},
    {"prepare_conv", fast_call(&prepare_conv), METH_FASTCALL, "See csrc/cpu/pixels/prepared.h."},
    {"run_conv", fast_call(&run_conv), METH_FASTCALL, "See csrc/cpu/pixels/prepared.h."},
    {"run_sequence", fast_call(&run_sequence), METH_FASTCALL, "See csrc/cpu/pixels/sequence.h."}};

PYBIND11_MODULE(_C, m) {
  m.doc() = "The binary of dynops.";
  for (PyMethodDef& method : methods) {
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
  }
  m.def("make_sequence", &make_sequence, "See csrc/cpu/pixels/sequence.h.");
  m.def("build_info", &build_info, "What the binary was built with, and what it runs on.");
}
