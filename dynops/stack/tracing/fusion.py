"""Steps of a trace joined: a convolution takes the norm, sum and activation after it."""

from __future__ import annotations


def fuse(steps: tuple, output: int) -> list:
    """Gives each convolution (and each norm without one) the norm, sum and activation after it.

    A fused step stands where its last part stood, so that a residual is there when it runs.
    """
    readers: dict[int, list[int]] = {output: [-1]}
    for i, step in enumerate(steps):
        for value in step.inputs:
            readers.setdefault(value, []).append(i)
    constants = {step.out for step in steps if step.kind == "attr"}
    taken: set[int] = set()
    fused: dict[int, tuple] = {}
    for i, step in enumerate(steps):
        if i in taken:
            continue
        if step.kind in ("conv", "norm"):
            step, i = _absorb(step, i, steps, readers, constants, taken)
        fused[i] = step
    return [fused[i] for i in sorted(fused)]


def _absorb(step, i: int, steps, readers, constants: set[int], taken: set[int]) -> tuple[tuple, int]:
    while (
        len(readers.get(step.out, ())) == 1
        and readers[step.out][0] >= 0
        and readers[step.out][0] not in taken
    ):
        j = readers[step.out][0]
        after = steps[j]
        if after.kind == "norm" and step.kind == "conv" and step.norm is None and step.residual is None:
            step = step._replace(norm=after.target, out=after.out)
        elif after.kind == "add" and step.residual is None and len(after.inputs) == 2:
            other = after.inputs[1] if after.inputs[0] == step.out else after.inputs[0]
            if other in constants:
                break
            step = step._replace(residual=other, inputs=(step.inputs[0], other), out=after.out)
        elif after.kind == "act" and after.activation:
            taken.add(j)
            return step._replace(activation=after.activation, out=after.out), j
        else:
            break
        taken.add(j)
        i = j
    return step, i
