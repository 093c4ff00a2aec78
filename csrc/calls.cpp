#include "calls.h"

#include <memory>
#include <string>
#include <vector>

#include "cpu/pixels/sequence.h"

// Not there in a C++ program without Python; see bindings.cpp.
#pragma weak PyCapsule_GetPointer
#pragma weak PyCapsule_New
#pragma weak PyErr_Format
#pragma weak PyErr_Occurred
#pragma weak PyErr_SetString
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyExc_RuntimeError
#pragma weak PyExc_TypeError
#pragma weak PyFloat_AsDouble
#pragma weak PyList_GetItem
#pragma weak PyList_Size
#pragma weak PyLong_AsLongLong
#pragma weak PyLong_AsVoidPtr
#pragma weak _Py_NoneStruct

namespace dynops {
namespace {

using cpu::PreparedConv;
using cpu::Sequence;

constexpr const char* kConv = "PreparedConv";
constexpr const char* kSequence = "Sequence";

// The arguments of a call, in order.
struct Arguments {
  PyObject* const* at;
  int64_t number() { return PyLong_AsLongLong(*at++); }
  template <class T>
  T* address() {
    return static_cast<T*>(PyLong_AsVoidPtr(*at++));
  }
  cpu::Values values() {
    const char* data = address<const char>();
    return {data, cpu::Dtype(number())};
  }
};

// The numbers of a list, in order.
struct Numbers {
  PyObject* list;
  Py_ssize_t at = 0;
  PyObject* next() { return PyList_GetItem(list, at++); }
  int64_t number() {
    PyObject* found = next();
    return found ? PyLong_AsLongLong(found) : 0;
  }
  double real() {
    PyObject* found = next();
    return found ? PyFloat_AsDouble(found) : 0;
  }
  const float* floats() { return reinterpret_cast<const float*>(number()); }
  std::vector<int64_t> numbers() {
    const int64_t count = number();
    std::vector<int64_t> found;
    for (int64_t i = 0; i < count && !PyErr_Occurred(); ++i) found.push_back(number());
    return found;
  }
};

template <class Of>
Geometry geometry(Of& of) {
  int64_t g[15];
  for (int64_t& size : g) size = of.number();
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], g[14]};
}

void forget_conv(PyObject* capsule) {
  delete static_cast<PreparedConv*>(PyCapsule_GetPointer(capsule, kConv));
}

void forget_sequence(PyObject* capsule) {
  delete static_cast<Sequence*>(PyCapsule_GetPointer(capsule, kSequence));
}

// Runs a kernel while other Python threads go on.
template <class Kernel>
PyObject* without_gil(const Kernel& kernel) {
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

cpu::SequenceStep step_of(Numbers& numbers, Numbers& prepared) {
  cpu::SequenceStep step{
      .kind = cpu::StepKind(numbers.number()), .inputs = numbers.numbers(), .out = numbers.number()};
  if (step.kind > cpu::kLastStepKind && !PyErr_Occurred()) {
    PyErr_Format(
        PyExc_RuntimeError,
        "dynops._C knows no step of kind %lld: dynops was changed since it was built. `make build` builds it",
        static_cast<long long>(step.kind));
  }
  if (numbers.number()) {
    PyObject* found = prepared.next();
    step.conv = found ? static_cast<PreparedConv*>(PyCapsule_GetPointer(found, kConv)) : nullptr;
  }
  if (numbers.number()) step.g = geometry(numbers);
  step.freed = numbers.numbers();
  step.channels = numbers.numbers();
  step.gamma = numbers.floats();
  step.beta = numbers.floats();
  step.eps = numbers.real();
  return step;
}

}  // namespace

PyObject* prepare_conv(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 28) return PyErr_Format(PyExc_TypeError, "prepare_conv: expected 28 integers, got %zd", count);
  Arguments a{arguments};
  const Geometry g = geometry(a);
  const auto dtype = cpu::Dtype(a.number());
  const int64_t in_channels = a.number(), out_channels = a.number();
  const bool pointwise = a.number(), winograd = a.number();
  const auto activation = cpu::Activation(a.number());
  const char* weight = a.address<const char>();
  const auto bias = a.values(), scale = a.values(), shift = a.values();
  if (PyErr_Occurred()) return nullptr;
  return PyCapsule_New(new PreparedConv(g, dtype, in_channels, out_channels, pointwise, winograd, activation,
                                        weight, bias, scale, shift),
                       kConv, &forget_conv);
}

PyObject* run_conv(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "run_conv: expected 9 arguments, got %zd", count);
  const auto* conv = static_cast<const PreparedConv*>(PyCapsule_GetPointer(arguments[0], kConv));
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

PyObject* make_sequence(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2)
    return PyErr_Format(PyExc_TypeError, "make_sequence: expected 2 lists, got %zd arguments", count);
  Numbers numbers{arguments[0]}, prepared{arguments[1]};
  auto made = std::make_unique<Sequence>();
  const std::vector<int64_t> values = numbers.numbers();
  for (size_t i = 0; i + 1 < values.size(); i += 2) made->values.push_back({values[i], values[i + 1]});
  made->inputs = numbers.numbers();
  made->outputs = numbers.numbers();
  const int64_t steps = numbers.number();
  for (int64_t i = 0; i < steps && !PyErr_Occurred(); ++i) made->steps.push_back(step_of(numbers, prepared));
  if (PyErr_Occurred()) return nullptr;
  return PyCapsule_New(made.release(), kSequence, &forget_sequence);
}

PyObject* run_sequence(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 2)
    return PyErr_Format(PyExc_TypeError, "run_sequence: expected 2 arguments or more, got %zd", count);
  const auto* sequence = static_cast<const Sequence*>(PyCapsule_GetPointer(arguments[0], kSequence));
  if (!sequence) return nullptr;
  const int64_t plans = PyLong_AsLongLong(arguments[1]);
  const auto expected = 2 + 6 * plans + int64_t(sequence->inputs.size() + sequence->outputs.size());
  if (plans < 0 || count != expected) {
    return PyErr_Format(PyExc_TypeError, "run_sequence: expected %lld arguments, got %zd",
                        static_cast<long long>(expected), count);
  }
  Arguments a{arguments + 2};
  std::vector<cpu::PlanView> views(plans);
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

}  // namespace dynops
