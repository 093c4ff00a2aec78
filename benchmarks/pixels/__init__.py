"""Benchmarks of convolutions on some pixels, and of a model built from them."""
