"""Measurements: theory, speed-up, realised and break-even. ``python -m benchmarks --help``."""
