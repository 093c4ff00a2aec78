"""The C++ kernels of experts: prepares memory for ``csrc/cpu/expert*.cpp``.

Same signatures as the references in ``ops/experts.py``, ``ops/expert_activations.py`` and ``ops/expert_rows.py``.
"""
