"""The policy *changed*: a model's own forward, run on values that are kept from its last call.

- ``followed``: :class:`~.followed.Followed`, the tensor that the model's Python computes with. Each function of torch
  that it calls becomes a step.
- ``tape``: the steps of a call, and the values between them, recorded in the first call. A later call is checked
  against it step by step.
- ``kinds``: what a function does to a change. It is found by trial when the step is recorded.
- ``frame``: one call. It knows what changed in each value, computes the rows of that, and writes them where they are kept.
- ``masks``: how a change spreads through a neighbourhood.
- ``stored``: a value that is kept, as rows ``[N * H * W, *channels]``.

The rows themselves are computed by the functions of :mod:`dynops.stack.maps`.
"""
