"""Images of different sizes as one batch: padded, in a loop, as torch's nested tensors, and under the mask of ``dynops.ragged``."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import torch
from torch import Tensor, nn

import dynops

from ..harness.compare import compare
from ..harness.contenders import FORMATS, bound, calibrated
from ..harness.rows import Row
from ..harness.setting import Setting
from ..models.macs import CountedPolicy
from ..resnet import resnet50
from . import uncached

IMAGES, MEAN, LARGEST = 8, (319, 362), (593, 599)  # of pytorch/nestedtensor#417
RESNET, RETINANET = "ResNet-50", "RetinaNet's ResNet-50 and pyramid"


def all_cases(quick: bool = False) -> list[str]:
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    return [RESNET, *([RETINANET] if has_torchvision and not quick else [])]


def images(count: int = IMAGES, mean=MEAN, largest=LARGEST) -> list[Tensor]:
    """``[3, h, w]`` each: of these mean and largest sizes, one image the tallest and one the widest."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.empty(count, 2, dtype=torch.int64)
    for axis in (0, 1):
        spread = torch.rand(count - 1, generator=generator) - 0.5
        rest = (mean[axis] * count - largest[axis]) / (count - 1)
        own = (rest + (spread - spread.mean()) * rest).round().long().clamp(32, largest[axis])
        sizes[:, axis] = torch.cat([own[:axis], torch.tensor([largest[axis]]), own[axis:]])
    return [torch.randn(3, h, w, generator=generator) for h, w in sizes.tolist()]


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    if case == RESNET:
        return calibrated(resnet50(), torch.randn(4, 3, 128, 128))
    from torchvision.models.detection import retinanet_resnet50_fpn

    return retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone.eval()


def measure(case: str, setting: Setting) -> list[Row]:
    """A row of ours and one of the loop, against the padded batch."""
    setting, model = replace(setting, compiled=False), build(case).to(**setting.options)
    batch = [image.to(**setting.options) for image in images(IMAGES)]
    x, mask = dynops.ragged(batch)
    padded, loop = {}, {}
    for name, memory_format in FORMATS.items():
        own = copy.deepcopy(model).to(memory_format=memory_format)
        padded[name] = bound(own, x.contiguous(memory_format=memory_format))
        loop[name] = bound(_each, own, [i[None].contiguous(memory_format=memory_format) for i in batch])
    share = sum(image[0].numel() for image in batch) / mask.numel()
    with torch.inference_mode():
        with CountedPolicy(torch.ones(1, 1, 1)) as counted:
            model(x[:1])
        failed = _nested(model, batch)
        dynops.convert_(model)
        ours = bound(_under_mask, model, x, mask)
        times = compare(padded, {"ours": ours, "loop": loop}, setting, flush=uncached)
    return [
        times.row(
            contender,
            suite="exact",
            group="images of different sizes",
            case=f"{case}, {IMAGES} of {MEAN[0]}x{MEAN[1]} in {x.shape[2]}x{x.shape[3]}",
            mask="images",
            density=share,
            variant="plain" if contender == "ours" else contender,
            gmacs=counted.dense * IMAGES / 1e9,
            computed_gmacs=counted.dense * IMAGES * share / 1e9,
            failed=failed,
        )
        for contender in ("ours", "loop")
    ]


def _each(model: nn.Module, batch: list[Tensor]) -> list:
    return [model(image) for image in batch]


def _under_mask(model: nn.Module, x: Tensor, mask: Tensor):
    with dynops.use_mask(mask, ragged=True):
        return model(x)


def _nested(model: nn.Module, batch: list[Tensor]) -> dict[str, str]:
    """Why nested tensors have no row: torch has no convolution of them."""
    try:
        model(torch.nested.nested_tensor(batch, layout=torch.jagged))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"nested": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    return {"nested": "it ran: measure it too"}
