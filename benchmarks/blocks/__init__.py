"""Benchmarks of stacks of layers on active blocks."""
