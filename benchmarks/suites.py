"""The suites of ``python -m benchmarks``: the cases, the budget and the legend of each."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch

from .blocks import stacks, video
from .channels import layers as channels
from .channels import weights
from .exact import pillars, pretraining
from .exact import ragged as different_sizes
from .experts import layers as experts
from .experts import model as expert_model
from .harness import machine, masks
from .harness.report import Report
from .harness.roofline import Roofline
from .harness.setting import Budget, Setting
from .harness.timing import rows_of
from .pixels import formats, layers, memory, model
from .samples import blocks, copies, exits, halting, skip_rnn, skipnet

LEGEND = """\
dense ms: the fastest of {NCHW, channels_last} x {eager, torch.compile}, in the same interleaved run; medians of warm
calls (each version has a turn of three calls, of which the first is not timed).
theory: MACs of the dense layer / MACs that must be computed.   speed-up: dense ms / ours ms, where ours goes
from the mask to the output, the plan included.   realised: speed-up / theory.   FLOPs are 2 x MACs.
break-even: the density below which ours is faster.   GFLOP/s: of ours, 2 x MACs that must be computed.
roofline: the share of our time that is the later of the MACs at the peak and the bytes at the speed of memory (weights,
inputs read, outputs written; both peaks measured in this run), and 10 us for a call on a CPU."""
BLOCKS_LEGEND = """\
theory: MACs of the dense stack / MACs of the active blocks and the halo that inner layers compute around them.
Blocks have the size that dynops.suggest_block_size chose for the stack and mask, beforehand; 32 on the tile path.
Density is that of the mask, in pixels; the blocks that cover it can hold more, which theory counts."""
CHANNELS_LEGEND = """\
theory: MACs of the dense layer / MACs of the live pairs of channels; density is the share of live channels on each
side that has some. CondConv, sample weights, involution and dynamic filters save no MACs (theory 1): "best dense" is
there the fastest of the ways to write them in PyTorch; DRConv's computes every region, CGNet's every output."""
EXACT_LEGEND = """\
Masks that cost no accuracy. The best dense version is the faster of eager NCHW and channels_last. theory: MACs of whole maps /
MACs at the pixels of the mask. masked pretraining: a step, forward and backward, against dense layers and masks. sparse
inputs: ours from coordinates and features to dense outputs, the plan included; the dense input map is there already. images of
different sizes: against the padded batch; loop: each image by itself. torch's nested tensors have no convolution."""
VIDEO_LEGEND = """\
A frame's density is the share of blocks that are computed again; ours goes from two frames and the last output to
the output, changed_blocks included. Every frame's output was compared with the dense network's first."""
FORMATS_LEGEND = """\
Speed-up over the eager dense layer in the same memory format, at the share of active pixels above each column; from the
mask to the output, the plan included; random masks; medians of one interleaved run. cold: 32 MB were written before each call."""
MEMORY_LEGEND = """\
MB (2**20 bytes) that one call holds at its peak above what was held before it, the output included; dense is the
smaller of eager NCHW and channels_last."""
EXPERTS_LEGEND = """\
One layer of SwiGLU experts, from tokens, their choices and weights to the output; medians of one interleaved run, several
routings in turn. best built-in: the fastest of transformers' eager and grouped_mm (at 1 token also batched_mm); of int8
weights: dynops in the dtype of the run; of one GEMM (rows gathered by token): torch's grouped_mm, sorting included.
roofline: the later of the MACs at the peak and the weights that have tokens at the memory speed, both measured between the
calls, and 10 us for a call on a CPU. GFLOP/s: 2 x MACs. Whole models: tokens a second are tokens / ms."""
SAMPLES_LEGEND = """\
theory: MACs of the dense network / MACs that must be computed, those of gates, halting scores and exit heads included; the
dense network has no gates and the last head only. density: the share of samples, blocks or steps that is computed.
residual: x + g F(x), two 3x3 convolutions with norms and a ReLU between, no ReLU after the sum; replace: SkipNet's, block(x)
or x, the ReLU after the sum inside the block. gated: ConvNet-AIG's gate is computed in the timing; else the decisions are
given. gate ms: the gate (the halting scores, the exit heads) called by itself. best of ours: the fastest of {NCHW,
channels_last} x {eager, module compiled for any batch}, as best dense is. p99: of at least 120 calls."""
LEGENDS = {
    "headline": f"{LEGEND}\n{EXPERTS_LEGEND}",
    "experts": EXPERTS_LEGEND,
    "blocks": f"{LEGEND}\n{BLOCKS_LEGEND}",
    "channels": f"{LEGEND}\n{CHANNELS_LEGEND}",
    "samples": f"{LEGEND}\n{SAMPLES_LEGEND}",
    "exact": EXACT_LEGEND,
    "video": f"{LEGEND}\n{VIDEO_LEGEND}",
    "memory": MEMORY_LEGEND,
    "formats": FORMATS_LEGEND,
}
QUICK_NOTE = (
    "Layers were measured without the torch.compile versions, to be quick. `python -m benchmarks layers` compares the "
    "forward pass of every layer with all four."
)
HEADLINE_NOTE = (
    "The model was not compiled in NCHW, to be quick: in every committed result that is slower than compiled in "
    "channels_last. `python -m benchmarks models` compares it with all four."
)
FLOAT16_NOTE = (
    "Dense float16 convolution on a CPU can be many times slower than float32, for want of instructions; a "
    "realised far over 1 measures that and not sparsity."
)
NO_TRANSFORMERS_NOTE = "transformers is not installed: nothing to compare experts with, and no model."
NO_PHOTO_NOTE = "matplotlib is not installed: no photograph, so no photo masks and no model."


# Each module has ``all_cases(quick)`` and ``measure(case, setting)``. Memory comes first: timing keeps freed memory.
SUITES: dict[str, tuple[ModuleType, ...]] = {
    "memory": (memory,),
    "layers": (layers,),
    "formats": (formats,),
    "blocks": (stacks,),
    "channels": (channels, weights),
    "samples": (blocks, skipnet, exits, halting, skip_rnn, copies),
    "models": (model,),
    "experts": (experts, expert_model),
    "video": (video,),
    "exact": (pretraining, pillars, different_sizes),
}
FORWARD_ONLY = (
    memory,
    formats,
    weights,
    skipnet,
    exits,
    halting,
    skip_rnn,
    copies,
    expert_model,
    video,
    pretraining,
)
WHOLE = ("models", "experts")  # keep their compiled versions where others are quick


def modules_of(suite: str, setting: Setting) -> list[ModuleType]:
    """The modules of a suite that can measure this; none where the suite has no backward pass."""
    return [module for module in SUITES[suite] if not (setting.backward and module in FORWARD_ONLY)]


def budget_of(suite: str, quick: bool) -> Budget:
    """The time of one comparison of a suite."""
    if suite == "formats":
        return Budget(0.3 if quick else 0.6, 5, 15, calls=1)
    if suite == "exact":
        return Budget(2 if quick else 5, 4, warmup=1, calls=1)
    if suite == "models":
        return Budget(5 if quick else 20, 5)
    if quick:
        return Budget(0.7, 5)
    return Budget(2.0, 5) if suite == "samples" else Budget()


def run(suite: str, setting: Setting, quick: bool) -> Report:
    """The report of a suite. ``quick``: fewer cases, each for a shorter time, without compiled layers."""
    quick_layers = (quick or setting.backward) and suite not in (*WHOLE, "memory", "formats", "exact")
    setting = replace(setting, budget=budget_of(suite, quick or quick_layers))
    if suite not in ("memory", "formats", "exact"):
        setting = replace(setting, roofline=Roofline(setting.device, setting.dtype))
    result = _report(setting)
    if quick_layers:  # compiling a backward pass for each of 72 layers takes half an hour
        setting = replace(setting, compiled=False, variants=False)
        result.notes.append(QUICK_NOTE)
    for module in modules_of(suite, setting):
        result.rows += rows_of(module, module.all_cases(quick), setting)
    return _noted(result, setting, suite == "experts")


def headline(setting: Setting) -> Report:
    """The report that `make bench` shows: a layer of each kind, experts, and the model at both sizes, in two minutes."""
    setting = replace(setting, roofline=Roofline(setting.device, setting.dtype))
    short = replace(setting, compiled=False, variants=False, budget=Budget(1.0, 5))
    result = _report(setting)
    result.notes.append(QUICK_NOTE)
    for module in (layers, channels, blocks, exits):
        result.rows += rows_of(module, module.headline_cases(), short)
    short = replace(short, budget=budget_of("experts", True))
    result.rows += rows_of(experts, experts.all_cases(quick=True), short)
    if "photo" in setting.mask_kinds:
        # each compilation of ResNet-50 takes 18 s on two cores, and there are two sizes
        setting = replace(setting, compiled_formats=("channels_last",), budget=Budget(8, 5))
        result.notes.append(HEADLINE_NOTE)
        for size in model.all_cases():
            result.rows += model.measure(size, setting, gates=("photo, 32x32 cells",))
    return _noted(result, setting, of_experts=True)


def _report(setting: Setting) -> Report:
    notes = [] if masks.has_photograph() else [NO_PHOTO_NOTE]
    if setting.dtype == torch.float16 and setting.device.type == "cpu":
        notes.append(FLOAT16_NOTE)
    busy = machine.busy_share()
    if busy > 0.1:
        notes.append(
            f"Other programs used {busy:.0%} of the processors when this began; measure again alone."
        )
    return Report(machine.machine(setting.device), notes=notes)


def _noted(result: Report, setting: Setting, of_experts: bool) -> Report:
    """The report with notes of what was measured beside its rows, and of what could not be."""
    if setting.roofline:
        result.notes.append(str(setting.roofline))
    if of_experts and not experts.available():
        result.notes.append(NO_TRANSFORMERS_NOTE)
    return result
