"""Layers that follow each other, run as one call of the binary (``csrc/cpu/pixels/sequence.h``).

Between two kernels Python costs 25 to 60 us a layer, most of it misses of the caches: more than the kernels themselves
where few pixels are active. A sequence is bound to the sizes of its inputs once. A call then looks at every weight and
statistic together, brings the plans, and runs. It takes float32 rows of compact plans on a CPU, without gradients, under
a mask; what it does not take, the layers run one by one.
"""

from .sequence import Sequence, parts_of

__all__ = ["Sequence", "parts_of"]
