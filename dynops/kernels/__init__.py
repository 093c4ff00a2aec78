"""Kernels, one module a backend and noun, imported when first used."""
