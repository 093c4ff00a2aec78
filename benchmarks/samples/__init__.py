"""Benchmarks of blocks, exits and steps that some samples skip."""
