"""Builds, tests and measures on the GPU that is there."""
