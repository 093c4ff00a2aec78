"""The three ways to run a network with early exits, which BranchyNet and MSDNet share."""

from __future__ import annotations

import torch
from torch import Tensor

from dynops.nn import EarlyExit


def run(model: EarlyExit, x: Tensor, mode: str) -> Tensor:
    if mode == "full":
        for stage in model.stages:
            x = stage(x)
        return model.heads[-1](x)
    if mode == "dynamic":
        return model(x).logits
    *early, out = model(
        x, all_exits=True
    )  # all for all samples, then for each sample the first that may answer
    for exit in reversed(range(len(early))):
        leave = model.criterion(early[exit], exit).leave
        out = torch.where(leave[:, None], early[exit], out)
    return out
