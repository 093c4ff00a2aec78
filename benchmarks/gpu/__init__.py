"""The GPU half: the audit of its kernels, which needs no GPU, and the measurements on one."""
