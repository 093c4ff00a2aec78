"""The C++ kernels: what prepares memory for ``csrc/cpu``."""
