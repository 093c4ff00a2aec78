"""What can be said of the GPU kernels without a GPU, and what is run on one: ``python -m benchmarks.gpu``."""
