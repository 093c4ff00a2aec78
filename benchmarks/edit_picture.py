"""The picture of docs/howto/edit-and-video.md: ``python -m benchmarks.edit_picture docs/img/edit.png`` (about half a minute).

An edit of the photograph, what each resolution of ResNet-50 computes of it, and the times, which are measured here.
"""

from __future__ import annotations

import io
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import dynops

from .front_page import DENSE as GREY
from .front_page import OURS
from .harness.compare import DENSE, compare
from .harness.machine import machine
from .harness.plots import pyplot
from .harness.setting import Budget, Setting
from .pixels import model as models

SIZE = models.SIZES[1]
STREAMS = {'spread="exact"': "exact", "spread=1": 1}


def edited(image: Tensor) -> tuple[Tensor, Tensor]:
    """A photograph ``[1, 3, H, W]`` with a square of 5 % from elsewhere in it, and its mask ``[1, H, W]``."""
    h, w = image.shape[2:]
    side = round((0.05 * h * w) ** 0.5)
    mask = torch.zeros(1, h, w, dtype=torch.bool)
    mask[:, h // 8 : h // 8 + side, w // 8 : w // 8 + side] = True
    return torch.where(mask[:, None], image.roll((-(h // 8), -(w // 4)), (2, 3)), image), mask


def decoded(model: nn.Module, stream: dynops.Stream, x: Tensor, mask: Tensor) -> Tensor:
    with stream.changed(mask):
        return model(x)


@torch.inference_mode()
def measured() -> tuple[Tensor, Tensor, dict, dict[str, float], float]:
    """Returns the edit, its mask, a report of each stream, milliseconds, and the relative error of the last stream.

    Milliseconds are by stream; "dense" is the fastest dense version.
    """
    image = models.photo_input(SIZE)
    edit, mask = edited(image)
    setting = Setting(torch.device("cpu"), torch.float32, budget=Budget(seconds=4.0))
    model = models.build_resnet50(image)
    before, x = (models.normalised(i).to(memory_format=torch.channels_last) for i in (image, edit))
    versions = models.network_versions(model, x, setting)
    exact = model(x)
    model.to(memory_format=torch.channels_last)
    dynops.incremental_(model)
    reports, calls, error = {}, {}, 0.0
    for name, spread in STREAMS.items():
        stream = dynops.Stream(spread=spread)
        with stream:
            model(before)
        calls[name] = partial(decoded, model, stream, x, mask)
        error = float((calls[name]() - exact).norm() / exact.norm())
        reports[name] = stream.report()
    times = compare(versions, calls, setting)
    found = {name: min(times.medians(name).values()) for name in calls}
    return edit, mask, reports, {"dense": min(times.medians(DENSE).values()), **found}, error


def shares(report) -> dict[tuple[int, int], float]:
    """The share of the pixels that the last step of each resolution computed."""
    return {row.size[1:]: row.share for row in report.rows if row.size is not None and min(row.size[1:]) > 1}


def draw(path: Path) -> None:
    """Measures, and writes the PNG.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    plot = pyplot()
    if plot is None:
        raise SystemExit("matplotlib: expected it to be installed")
    from PIL import Image  # which comes with matplotlib

    edit, mask, reports, times, error = measured()
    sizes = [size for size in shares(reports['spread="exact"']) if size[0] < SIZE[0] // 2]
    figure, axes = plot.subplots(
        2, 3 + len(sizes), figsize=(11, 4), layout="constrained", width_ratios=[1] * (2 + len(sizes)) + [1.9]
    )
    for rest in axes[1, :2]:
        rest.set_axis_off()
    axes[0, 0].imshow(edit[0].permute(1, 2, 0))
    axes[0, 0].set_title("the edited image", fontsize=8)
    axes[0, 1].imshow(mask[0], cmap="gray_r", vmin=0, vmax=1.5)
    axes[0, 1].set_title(f"changed: {float(mask.float().mean()):.0%}", fontsize=8)
    for line, (name, report) in enumerate(reports.items()):
        for i, size in enumerate(sizes):
            panel = axes[line, 2 + i]
            panel.imshow(report.picture(size), cmap="gray_r", vmin=0, vmax=380)
            panel.set_title(f"{size[0]}x{size[1]}: {shares(report)[size]:.0%}", fontsize=8)
        axes[line, 2].set_ylabel(name, fontsize=9)
    for panel in axes[:, :-1].flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in axes[:, -1]:
        panel.remove()
    bars = figure.add_subplot(axes[0, 0].get_gridspec()[:, -1])
    drawn = bars.barh(list(times), list(times.values()), color=[GREY, OURS, OURS], height=0.6)
    labels = [f"{times['dense']:.0f} ms"]
    labels += [
        f"{times[n]:.0f} ms, {times['dense'] / times[n]:.1f}x of {r.theory:.1f}x" for n, r in reports.items()
    ]
    bars.bar_label(drawn, labels, padding=3, fontsize=8)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.5 * times["dense"])
    info = machine(torch.device("cpu"))
    bars.set_title(
        f"ResNet-50, {SIZE[0]}x{SIZE[1]}, float32\n{info['device']}, {info['threads']} threads", fontsize=8
    )
    bars.set_xlabel("milliseconds", fontsize=8)
    bars.tick_params(length=0, labelsize=8)
    bars.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plot.close(figure)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)
    print(
        f"{path}: {times}, theory {[round(r.theory, 2) for r in reports.values()]}, relative error of the last {error:.1e}"
    )


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
