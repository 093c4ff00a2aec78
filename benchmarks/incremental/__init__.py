"""``python -m benchmarks incremental``: models that keep what did not change since the last call (``dynops.Stream``)."""
