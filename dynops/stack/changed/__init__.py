"""The policy *changed*: a model's own forward, run on values that are kept from its last call.

- ``followed``: :class:`~.followed.Followed`, the tensor that the model's Python computes with. Each function of torch
  that it calls becomes a step.
- ``tape``: the steps of a call, and the values between them, recorded in the first call. A later call is checked
  against it step by step.
- ``rules``, ``views``: what a function does to a change, and how it computes rows: of a neighbourhood, of a whole map.
  ``finding`` finds the rule of a step, and ``trying`` tries functions that it does not know. ``arguments`` names theirs.
- ``frame``: one call. It runs the steps of which something changed. Its parts: ``changes`` (where values changed),
  ``contents`` (what they hold), ``fused`` (a convolution with what follows it as one kernel).
- ``masks``: how a change spreads through a neighbourhood.
- ``stored``: a value that is kept, as rows ``[N * H * W, *channels]``.

The rows themselves are computed by the functions of :mod:`dynops.stack.maps`.
"""
