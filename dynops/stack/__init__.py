"""A module's forward as a graph of layers over numbered values, which runs on rows or on tiles.

- ``trace`` records the forward as steps, and joins each convolution with the norm, sum and activation after it.
- ``graph`` makes a :class:`~dynops.stack.graph.Stack` of the steps: layers in their order. A value may have several
  readers: branches, sums and concatenation are ordinary.
- ``layers`` has one class for each type of layer: what it reads (its receptive field, and so its output's size), how it
  runs on rows and on tiles, its MACs. To add a type, write its class and name it in ``layers/__init__.py``.
- ``policy`` says which plan each value has on rows, and what lies outside it. *Masked*: a value exists at the mask of
  its own resolution and is zero elsewhere, after every layer. *Needed*: a value exists wherever a later layer reads it.
- ``run_rows`` runs a stack on packed rows by a policy. ``run_tiles`` runs it on blocks with their halo.

A module becomes a stack in two ways. ``program.Program`` takes any trace: a layer that cannot run on rows gets dense
maps. ``traced.Traced`` takes layers with a finite receptive field only, so that a part of the output needs a part of the
input; it keeps what follows from the input's size, and the MACs and expected time of a run.

Under a mask the statistics of a norm (batch, group, instance) are those of the active pixels. A global mean is over the
whole map, of which the inactive pixels are zero, as the dense layer computes it.
"""
