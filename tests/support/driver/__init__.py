"""A stand-in for NVIDIA GPUs and their driver: it checks and records every launch, and runs nothing.

``pytest tests/gpu/test_driver.py`` runs tests in a process where ``torch.device("cuda", i)`` is one of
``machine.GPUS``. By hand: ``PYTHONPATH=.:tests/support:tests/support/launches DYNOPS_STAND_IN=FOLDER python -m driver
FILE…``. It needs PyTorch without CUDA, Triton and a C++ compiler, and no GPU. There

- tensors have the sizes of a real GPU's, and memory of zeros that takes no room until it is touched (``tensors.py``);
- PyTorch's own ops run on the host, large floating ones not at all;
- Triton binds, compiles, makes descriptors and launches as on a GPU (``launches.py``);
- the driver below it (``libcuda.c``) refuses what a real one would, and what a kernel would not survive;
- streams, events and captures keep an order, in which races are found (``order.py``).

What fails, and who says so:

===================================================================  =====================================
a TMA descriptor: strides, box, swizzle, alignment, end of memory    the driver, as Triton's RuntimeError
a grid: y and z over 65535                                           the driver
a grid without a program or of 2**31 (Triton skips both silently)    ``launches.Illegal``
shared memory over the device's                                      Triton's OutOfResources, the driver
an argument that is no multiple of 16 in code made for these         ``launches.Illegal``
a tensor of the CPU or of another device in a launch                 the driver
a wait of the host within ``watch.capture()``                        ``watch.HostWaits``
a side stream that a capture does not join, work outside of it       ``order.Race``
memory used on two streams without an event between                  ``order.Race``
memory freed while another stream uses it                            ``order.Race``, at the end of ``watch.fresh()``
===================================================================  =====================================

``watch.counts`` has the number of launches of each kernel ("kernels" in all), of PyTorch's ops ("torch"), and of
the host's waits ("host"). Kernels compute nothing, so their results are zeros: a plan that a kernel makes is empty.
"""
