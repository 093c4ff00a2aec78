"""Benchmarks of convolutions on some channels, or with weights of each sample."""
