// Kernels that Python calls by address, without a dispatcher. Tensors are integers: their addresses. Callers
// hold the memory, and have checked shapes and dtypes.
#pragma once

#include <Python.h>

namespace dynops {

using FastCall = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

inline PyCFunction fast_call(FastCall* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// prepare_conv(15 numbers of a geometry, dtype, in_channels, out_channels, pointwise, winograd, activation,
// weight, and address and dtype of bias, scale and shift): what run_conv takes. See cpu/pixels/prepared.h.
FastCall prepare_conv;

// run_conv(prepared, x, index, rows, source, residual, quads, tiles, out). An op's schema of 17 arguments
// takes 20 us to match.
FastCall run_conv;

// make_sequence(numbers, prepared): what run_sequence takes; see cpu/pixels/sequence.h. `numbers`, a list,
// holds the values (plan, channels of each), the inputs, the outputs, and the steps: kind, inputs, out,
// whether there is a prepared convolution (the next of the list `prepared`, which the caller keeps), geometry
// (15 numbers or none), freed, channels, gamma, beta and eps. A count stands before each list.
FastCall make_sequence;

// run_sequence(sequence, plans, (index, inverse, quads, rows, tiles, pixels) of each, the inputs' and the
// outputs' addresses).
FastCall run_sequence;

}  // namespace dynops
