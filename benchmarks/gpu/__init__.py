"""The GPU half: what can be known of its kernels without a GPU, and what is measured on one."""
