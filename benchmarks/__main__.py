"""The command line: ``python -m benchmarks headline|layers|formats|models|experts|video|memory|all|readme``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from . import (
    blocks,
    channel_weights,
    channels,
    exits,
    expert_rows,
    experts,
    formats,
    front_page,
    layers,
    masks,
    memory,
    models,
    readme,
    report,
    sample_copies,
    sample_loops,
    sample_rows,
    samples,
    skipnet,
    video,
)
from .timing import Budget

ROOT = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEGEND = """\
dense ms: the fastest of {NCHW, channels_last} x {eager, torch.compile}, in the same interleaved run; medians of warm
calls (each version has a turn of three calls, of which the first is not timed).
theory: MACs of the dense layer / MACs that must be computed.   speed-up: dense ms / ours ms, where ours goes
from the mask to the output, the plan included.   realised: speed-up / theory.   FLOPs are 2 x MACs.
break-even: the density below which ours is faster."""
BLOCKS_LEGEND = """\
theory: MACs of the dense stack / MACs of the active blocks and the halo that inner layers compute around them.
Blocks have the size that dynops.suggest_block_size chose for the stack and mask, beforehand; 32 on the tile path.
Density is that of the mask, in pixels; the blocks that cover it can hold more, which theory counts."""
CHANNELS_LEGEND = """\
theory: MACs of the dense layer / MACs of the live pairs of channels; density is the share of live channels on each
side that has some. CondConv, sample weights, involution and dynamic filters save no MACs (theory 1): "best dense" is
there the fastest of the ways to write them in PyTorch; DRConv's computes every region, CGNet's every output."""
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
roofline: the later of the MACs at the peak and the weights that have tokens at the memory speed, both measured in this run.
GFLOP/s: 2 x MACs. Whole models: tokens a second are tokens / ms."""
SAMPLES_LEGEND = """\
theory: MACs of the dense network / MACs that must be computed, those of gates, halting scores and exit heads included; the
dense network has no gates and the last head only. density: the share of samples, blocks or steps that is computed.
residual: x + g F(x), two 3x3 convolutions with norms and a ReLU between, no ReLU after the sum; replace: SkipNet's, block(x)
or x, the ReLU after the sum inside the block. gated: ConvNet-AIG's gate is computed in the timing; else the decisions are
given. gate ms: the gate (the halting scores, the exit heads) called by itself. best of ours: the fastest of {NCHW,
channels_last} x {eager, module compiled for any batch}, as best dense is. p99: of at least 120 calls."""
LEGENDS = {
    "experts": EXPERTS_LEGEND,
    "blocks": f"{LEGEND}\n{BLOCKS_LEGEND}",
    "channels": f"{LEGEND}\n{CHANNELS_LEGEND}",
    "samples": f"{LEGEND}\n{SAMPLES_LEGEND}",
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
QUICK_STACKS_NOTE = "Measured without the torch.compile versions, to be quick."
FLOAT16_NOTE = (
    "Dense float16 convolution on a CPU can be many times slower than float32, for want of instructions; a "
    "realised far over 1 measures that and not sparsity."
)
NO_TRANSFORMERS_NOTE = "transformers is not installed: nothing to compare experts with, and no model."
NO_PHOTO_NOTE = "matplotlib is not installed: no photograph, so no photo masks and no model."


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.op != "pixels" and args.command != "layers":
        raise SystemExit(f"--op {args.op}: expected with the command layers, got {args.command}")
    if args.command == "readme":
        write_readme(ROOT.parent, args.out or ROOT / "results")
        return
    setting = _setting(args)
    out = args.out or ROOT / "out"
    if args.command == "headline":
        _finish(headline(setting), "headline", setting, out, plot=True)
        return
    # memory first: timing keeps freed memory from then on
    chosen = (args.command,) if args.op == "pixels" else (args.op,)
    if args.command == "all":
        chosen = (
            "memory",
            "layers",
            "formats",
            "blocks",
            "channels",
            "samples",
            "models",
            "experts",
            "video",
        )
    if setting.backward:
        chosen = tuple(suite for suite in chosen if suite not in FORWARD_ONLY)
    for suite in chosen:
        _finish(SUITES[suite](setting, args.quick), suite, setting, out, args.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = ["headline", "layers", "formats", "models", "experts", "video", "memory", "all", "readme"]
    parser.add_argument(
        "command", choices=commands, help="readme rewrites the README's numbers from results/"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.1], metavar="D")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    nouns = ["pixels", "blocks", "channels", "samples"]
    parser.add_argument("--op", default="pixels", choices=nouns, help="what layers skips")
    parser.add_argument("--backward", action="store_true", help="forward and backward, for both")
    parser.add_argument("--quick", action="store_true", help="fewer layers, shorter, no compiled layers")
    parser.add_argument(
        "--plot", action="store_true", help="a PNG too: speed-up against density, of experts against tokens"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and PNG (benchmarks/out)")
    return parser


def _setting(args: argparse.Namespace) -> layers.Setting:
    setting = layers.Setting(
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
        densities=tuple(sorted(args.density, reverse=True)),
        backward=args.backward,
    )
    wrong = [d for d in setting.densities if not 0 < d <= 1]
    if wrong:
        raise SystemExit(f"--density: expected numbers in (0, 1], got {wrong}")
    if not _has_photograph():
        setting = dataclasses.replace(setting, mask_kinds=("random", "square"))
    return setting


def _has_photograph() -> bool:
    try:
        masks.photograph()
    except ImportError:
        return False
    return True


def _report(setting: layers.Setting) -> report.Report:
    notes = [] if _has_photograph() else [NO_PHOTO_NOTE]
    if setting.dtype == torch.float16 and setting.device.type == "cpu":
        notes.append(FLOAT16_NOTE)
    busy = report.busy_share()
    if busy > 0.1:
        notes.append(
            f"Other programs used {busy:.0%} of the processors when this began; measure again alone."
        )
    return report.Report(report.machine(setting.device), notes=notes)


# ------------------------------------------------------------------------------------------ suites


def run_layers(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    if quick or setting.backward:  # compiling a backward pass for each of 72 layers takes half an hour
        setting = dataclasses.replace(setting, compiled=False, variants=False, budget=Budget(0.7, 5))
        result.notes.append(QUICK_NOTE)
    result.rows = layers.run(layers.all_cases(quick), setting)
    return result


def run_formats(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    setting = dataclasses.replace(setting, budget=Budget(0.3 if quick else 0.6, 5, 15))
    result.rows = formats.run(formats.all_cases(quick), setting)
    return result


def run_blocks(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    if quick or setting.backward:
        setting = dataclasses.replace(setting, compiled=False, variants=False, budget=Budget(0.7, 5))
        result.notes.append(QUICK_STACKS_NOTE)
    result.rows = blocks.run(blocks.all_cases(quick), setting)
    return result


def run_channels(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    if quick or setting.backward:
        setting = dataclasses.replace(setting, compiled=False, budget=Budget(0.7, 5))
        result.notes.append(QUICK_STACKS_NOTE)
    result.rows = channels.run(channels.all_cases(quick), setting)
    if not setting.backward:
        result.rows += channel_weights.run(channel_weights.all_cases(quick), setting)
    return result


def run_samples(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    setting = dataclasses.replace(setting, budget=Budget(2.0, 5))
    if quick or setting.backward:
        setting = dataclasses.replace(setting, compiled=False, budget=Budget(0.7, 5))
        result.notes.append(QUICK_STACKS_NOTE)
    result.rows = samples.run(samples.all_cases(quick), setting)
    if not setting.backward:
        result.rows += skipnet.run(setting, depth=3 if quick else 18)
        result.rows += exits.run(exits.all_cases(quick), setting)
        result.rows += sample_loops.run(setting, quick)
        result.copies = sample_copies.run(setting, sample_copies.SHAPES[: 1 if quick else None])
    return result


def run_experts(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    if not experts.available():
        result.notes.append(NO_TRANSFORMERS_NOTE)
        return result
    machine = experts.Machine(setting.device, setting.dtype)
    if quick:
        setting = dataclasses.replace(setting, budget=Budget(0.7, 5))
    result.experts = experts.run(setting, machine, quick)
    result.notes.append(str(machine))
    if not quick and not setting.backward:
        from . import models_experts  # needs transformers

        result.experts += models_experts.run(setting)
    return result


def run_video(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    if "photo" in setting.mask_kinds:
        if quick:
            setting = dataclasses.replace(setting, compiled=False, budget=Budget(0.7, 5))
            result.notes.append(QUICK_STACKS_NOTE)
        result.rows = video.run(setting, count=6 if quick else video.FRAMES)
    return result


def run_models(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    if "photo" in setting.mask_kinds:
        sizes = models.SIZES[:1] if quick else models.SIZES
        setting = dataclasses.replace(setting, budget=Budget(5 if quick else 20, 5))
        result.rows = models.run(setting, sizes)
    return result


def run_memory(setting: layers.Setting, quick: bool) -> report.Report:
    result = _report(setting)
    result.memory = memory.run(setting, memory.CASES[:2] if quick else None)
    return result


SUITES = {
    "layers": run_layers,
    "formats": run_formats,
    "blocks": run_blocks,
    "channels": run_channels,
    "samples": run_samples,
    "models": run_models,
    "experts": run_experts,
    "video": run_video,
    "memory": run_memory,
}
FORWARD_ONLY = ("memory", "video", "formats")


def headline(setting: layers.Setting) -> report.Report:
    """The report of `make bench`, in about two minutes: a layer of each kind, experts, and the model at both sizes."""
    result = _report(setting)
    result.notes.append(QUICK_NOTE)
    short = dataclasses.replace(setting, compiled=False, variants=False, budget=Budget(1.0, 5))
    result.rows = layers.run(layers.headline_cases(), short)
    result.rows += channels.run(channels.headline_cases(), short)
    result.rows += samples.run(samples.headline_cases(), short) + exits.run(exits.headline_cases(), short)
    mixture = run_experts(short, quick=True)
    result.experts = mixture.experts
    result.notes += [note for note in mixture.notes if note not in result.notes]
    if "photo" in setting.mask_kinds:
        # each compilation of ResNet-50 takes 18 s on two cores, and there are two sizes
        setting = dataclasses.replace(setting, compiled_formats=("channels_last",), budget=Budget(8, 5))
        result.rows += models.run(setting, gates=("photo, 32x32 cells",))
        result.notes.append(HEADLINE_NOTE)
    return result


def _finish(result: report.Report, suite: str, setting: layers.Setting, out: Path, plot: bool) -> None:
    """Prints everything, the summary last, and writes the files."""
    info = result.machine
    legend = LEGENDS.get(suite, LEGEND)
    if result.rows and result.experts:
        legend += f"\n{EXPERTS_LEGEND}"
    print(f"\n{report.machine_line(info)}\n{setting.dtype}, {setting.mode}\n{legend}\n")
    if not info["build"]:
        print("dynops._C is not built: these are times of the plain-PyTorch reference.\n")
    if suite == "formats":
        print(formats.table(result.rows), "\n")
    elif result.rows:
        print(report.table(result.rows), "\n")
        print(report.summary_table(report.summaries(result.rows, layers.TARGET_GROUPS)), "\n")
    if suite == "samples":
        print(sample_rows.target_table(result.rows), "\n")
    if result.copies:
        print(sample_rows.copy_table(result.copies), "\n")
    if result.memory:
        print(report.memory_table(result.memory), "\n")
    if result.experts:
        print(*expert_rows.tables(result.experts), sep="\n\n", end="\n\n")
    for note in result.notes:
        print(f"note: {note}")
    dtype = str(setting.dtype).removeprefix("torch.")
    for path in result.save(out, report.file_stem(info, dtype, suite, setting.mode), plot):
        print(f"wrote {path}")


def write_readme(root: Path, results: Path) -> None:
    """Writes every number of README.md and docs/benchmarks.md, and README's picture, from the files in ``results``."""
    reports = [report.Report.load(found) for found in sorted(results.glob("*.json"))]
    reports = [found for found in reports if not found.checks]  # of a GPU: their tables are other ones
    if not reports:
        raise SystemExit(f"{results}: there are no results (python -m benchmarks all --out {results})")
    tables = {
        "table": readme.pixels_block(reports, layers.TARGET_GROUPS),
        "blocks": readme.blocks_block(reports),
        "channels": readme.channels_block(reports),
        "samples": readme.samples_block(reports),
        "examples": readme.examples_block(results),
        "experts": readme.experts_block(reports),
    }
    for name, table in tables.items():
        readme.rewrite(root / "docs" / "benchmarks.md", name, table)
    readme.rewrite(root / "README.md", "headline", front_page.headline_block(reports))
    front_page.draw(reports, root / "docs" / "img" / "resnet50.png")
    print(f"{root}: numbers of {len(reports)} files in {results}")


if __name__ == "__main__":
    main()
