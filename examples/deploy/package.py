"""Packages a converted ResNet for C++: ``python -m examples.deploy.package build/deploy``; ``run.cpp`` runs it.

Batch, image and mask may have any size in the package. It computes on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import dynops
from benchmarks.resnet import resnet18


class Masked(nn.Module):
    """A converted model with the mask as its second input."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        dynops.convert_(model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        with dynops.use_mask(mask):
            return self.model(x)


def package(model: nn.Module, x: Tensor, mask: Tensor, path: Path) -> Path:
    """Writes the package of ``model`` under a mask to ``path``, which ends in .pt2.

    Args:
        x, mask: ``[N, C, H, W]`` and ``[N, h, w]``, an example of more than one sample, row and column.
    """
    sizes = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "mask": {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}}
    with torch.no_grad():  # with gradients, norms and activations would not be fused
        program = torch.export.export(Masked(model).eval(), (x, mask), dynamic_shapes=sizes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    inputs = torch.randn(2, 3, 224, 224), torch.rand(2, 7, 7) < 0.25
    torch.save(inputs, folder / "inputs.pt")
    print(package(resnet18(), *inputs, folder / "model.pt2"))
