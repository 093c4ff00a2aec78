"""Plants faults in a copy of the tree, one at a time, and says which of them the tests of their area find.

    python tests/tools/planted.py [--copy FOLDER] [NAME ...]

``FOLDER`` keeps the copy, and what was built in it, for the next run. Faults in C++ take a compiler.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """``old`` becomes ``new`` in the one file under ``where`` that has it, once; ``tests``: files below ``tests``."""

    where: str
    old: str
    new: str
    tests: str

    def place(self, tree: Path) -> Path:
        files = (
            [tree / self.where] if (tree / self.where).is_file() else sorted((tree / self.where).rglob("*"))
        )
        counts = {f: f.read_text().count(self.old) for f in files if f.suffix in (".py", ".h", ".cpp")}
        found = [f for f, count in counts.items() if count]
        if len(found) != 1 or counts[found[0]] != 1:
            raise LookupError(f"{self.where}: expected {self.old!r} once, got {[str(f) for f in found]}")
        return found[0]


PIXELS, TRITON = "dynops/ops/pixels", "dynops/kernels/triton"
INTERPRETED = "gpu/interpreted/interpreted_"
ROWS = "ops/test_samples contracts/test_autograd_modes"
FAULTS = {
    # plans
    "repeat of a batch": Fault("dynops/plans", "repeat_index(self.index, batch, self.num_pixels)", "repeat_index(self.index, batch, self.num_rows)", "plans/test_one_mask"),
    "padding of one side": Fault("dynops/plans", "window_count(in_size[i], k, s, p, p, d)", "window_count(in_size[i], k, s, p, 0, d)", "plans/test_plans"),
    "one channel more": Fault("dynops/plans", "torch.where(all_channels < count[:, None], all_channels, -1)", "torch.where(all_channels <= count[:, None], all_channels, -1)", "plans/test_channel_plans"),
    "tolerance itself": Fault("dynops/plans", ".abs() <= tolerance).all(1)", ".abs() < tolerance).all(1)", "plans/test_changed_blocks"),
    # what is kept of weights
    "no version check": Fault("dynops/kept.py", "if entry.mark.holds(tensor, *others):", "if True:", "contracts/test_kept contracts/test_kept_cache"),
    "kept over a step": Fault("dynops/kept.py", "if epoch == self.epoch and not _shares_memory", "if not _shares_memory", "contracts/test_kept contracts/test_kept_cache"),
    # ops in Python
    "swapped padding": Fault("dynops/geometry.py", "return self.pad_w, right, self.pad_h, bottom", "return self.pad_h, right, self.pad_w, bottom", "ops/pixels/test_pixels"),
    "mean of a bias": Fault(PIXELS, "db = zero_past_count(rows, index, count).sum(0)", "db = zero_past_count(rows, index, count).mean(0)", "ops/pixels/test_pixels"),
    "batch of a bias": Fault("dynops/ops/dense_conv.py", "return grad.sum((0, 2, 3), dtype=_wider(grad.dtype)).to(", "return grad.mean(0).sum((1, 2), dtype=_wider(grad.dtype)).to(", "ops/pixels/test_pixels"),
    "strides of a fake": Fault(PIXELS, "layout = memory_format_of(x) if source is None else torch.channels_last", "layout = torch.contiguous_format", "contracts/test_contracts"),
    "rows past the count": Fault(PIXELS, "dscale = zero_past_count(dscale[:, None], index, count)[:, 0]", "pass", ROWS),
    "lost term of a base": Fault(PIXELS, "left = torch.where(scale[:, None] == 1, left, (1 - scale.to(dkept.dtype))[:, None] * dkept)", "pass", ROWS),
    "mixing for adding": Fault("dynops/ops/samples.py", "plan.count, base, scale, not add)", "plan.count, base, scale, add)", "ops/test_samples"),
    # large images
    "a cut at another stride": Fault("dynops/tiling", "while math.gcd(steps, 2 * 3 * 5 * 7) > 1:", "while False:", "tiling/test_tiles"),
    "a pixel of the halo": Fault("dynops/tiling", "start, end = max(first - before, 0), min(last + after, size)", "start, end = max(first - before + stride, 0), min(last + after, size)", "tiling/test_tiles"),
    "weights of skipped windows": Fault("dynops/tiling", "self.total[:, columns] += self.weights", "self.total[:, columns] += 1", "tiling/test_tiles"),
    # maps
    "a border's corner": Fault("dynops/stack/maps", "index = plan.inverse()[:, rows][:, :, columns]", "index = plan.inverse()[:, rows][:, :, columns.flip(0)]", "stack/maps/test_maps"),
    "an axis of a stack": Fault("dynops/stack/maps", 'made = torch.stack(rows, 1 + base.axes[:dim].count("c"))', 'made = torch.stack(rows, 1)', "stack/maps/test_maps"),
    "keys outside of the mask": Fault("dynops/stack/maps", "bias[-1] = math.log(zeros)", "bias[-1] = 0", "stack/maps/test_maps"),
    "a vector for all samples": Fault("dynops/stack/sequences", "values = x.flatten(1).expand(batch, -1).contiguous()", "values = x.flatten(1)[:1].expand(batch, -1).contiguous()", "stack/test_outputs"),
    "the centres of pixels": Fault("dynops/geometry.py", "places = [max(0.0, (i + 0.5) * step - 0.5) for i in range(out_size)]", "places = [i * step for i in range(out_size)]", "stack/sequences/test_sequences"),
    # layers
    "no halo": Fault("dynops/stack", "first, size = out.first * self.stride - self.before,", "first, size = out.first * self.stride,", "nn/test_blocks"),
    "one over the cap": Fault("dynops/nn/samples", "_confidence(confidence, logits), most)", "_confidence(confidence, logits), most + 1)", "nn/samples/test_exits"),
    "dtype of a head": Fault("dynops/nn/samples", "rows.append(gone[0].to(like.dtype))", "rows.append(gone[0])", "nn/samples/test_dtypes"),
    "biased variance": Fault("dynops/stack/norm.py", "var * (n / (n - 1).clamp(min=1))", "var", "nn/channels/test_convs"),
    "padding that counts": Fault("dynops/nn/experts", "tokens = counted.sum().clamp(min=1)", "tokens = counted.numel()", "nn/test_routers nn/test_expert_attacks"),
    "groups of MACs": Fault("dynops/budget", "module.in_channels * module.out_channels / module.groups", "module.in_channels * module.out_channels", "budget/test_layers"),
    "gate without gradient": Fault("dynops/gates", "is_open.to(soft.dtype) + (soft - soft.detach())", "is_open.to(soft.dtype) + 0 * soft", "gates/test_gates"),
    # kernels in Triton
    "skipped tail": Fault(TRITON, "steps = walked * tl.cdiv(k_size, K)", "steps = walked * (k_size // K)", INTERPRETED + "pixels"),
    "rows that are not live": Fault(TRITON + "/gemm.py", "z = tl.where(live[:, None], z, 0.0)", "z = z + 0.0", INTERPRETED + "pixels"),
    "a row too many": Fault(TRITON, "stored = row < rows", "stored = row <= rows", INTERPRETED + "pixels"),
    "the last part alone": Fault(TRITON, "z += tl.load(sums + part_at + at,", "z = tl.load(sums + part_at + at,", INTERPRETED + "pixels"),
    "group of a channel": Fault(TRITON + "/pixels.py", "group = channel // n_size", "group = channel // k_size", INTERPRETED + "pixels"),
    "dropped shift": Fault(TRITON, "z += tl.load(shift + channel", "z += 0 * tl.load(shift + channel", INTERPRETED + "pixels"),
    "six that is eight": Fault(TRITON + "/gemm.py", "tl.where(z > 6, 6.0, z)", "tl.where(z > 8, 8.0, z)", INTERPRETED + "pixels"),
    "a box past its block": Fault(TRITON, "live = (i + y < tile_h) & (j + x < tile_w)", "live = (i + y >= 0) & (j + x < tile_w)", INTERPRETED + "blocks"),
    "sum over choices": Fault(TRITON, "acc += value", "acc = value", INTERPRETED + "experts"),
    "experts of a later block": Fault(TRITON, "<= tile) & (expert == start)", "<= tile)", INTERPRETED + "experts"),
    "packed for not": Fault(TRITON, "x_row = row if PACKED else pair // topk", "x_row = pair // topk", INTERPRETED + "experts"),
    # kernels in C++
    "height for width": Fault("csrc", "+ g.pad_h - r * g.dil_h", "+ g.pad_w - r * g.dil_h", "ops/pixels/test_pixels"),
    "gate of another row": Fault("csrc", "f_.gate[class_.row(first + i)]", "f_.gate[i]", "ops/pixels/test_pixels"),
    "unused rows": Fault("csrc", "if (out.size(0) > rows) std::memset(", "if (false) std::memset(", "ops/pixels/test_packed_rows ops/test_samples"),
    "share of the base": Fault("csrc", "{mix ? 1.f - share : 1.f, share}", "{1.f, share}", "ops/test_samples"),
    "threshold itself": Fault("csrc", "double(total) / area > threshold", "double(total) / area >= threshold", "ops/test_blocks plans/test_block_plans"),
    "step of the columns": Fault("csrc", "clipped(g.first_w + bx * g.step_w,", "clipped(g.first_w + bx * g.step_h,", "ops/test_blocks plans/test_block_plans"),
    "rows of a block": Fault("csrc", "out[i - width] + int32_t(g.width)", "out[i - width] + int32_t(width)", "ops/test_blocks plans/test_block_plans"),
    "weight of a pair": Fault("csrc", "one[0] = weight[plan.order[p]]", "one[0] = weight[p]", "ops/experts/test_experts"),
    "row of a pair": Fault("csrc", "packed ? row : pair / plan.topk", "packed ? row : pair % plan.topk", "ops/experts/test_experts"),
    "channel of a group": Fault("csrc", "relative_[i] = index_[i] % width_", "relative_[i] = index_[i]", "ops/channels/test_channels"),
    "end of a group": Fault("csrc", "std::lower_bound(first, end, int32_t(group + 1) * width_)", "end", "ops/channels/test_channels"),
    "reach of a change": Fault("dynops/stack/changed", "transposed=1 - int(g.transposed)", "transposed=int(g.transposed)", "stack/changed/test_exact"),
    "change of two maps": Fault("dynops/stack/changed", "mask if other is largest else mask | other.mask()", "mask", "stack/changed/test_exact stack/changed/test_follow"),
    "what stays owed": Fault("dynops/stack/changed", "index_copy_(0, positions(plan)[moved], rows[moved])", "index_copy_(0, positions(plan), rows)", "stack/changed/test_stream"),
    "a value in the place of another": Fault("dynops/stack/changed", "if step.key == key:", "if step.name == name:", "stack/changed/test_follow"),
}  # fmt: skip


def copy_of(tree: Path, copy: Path) -> None:
    """The files that git knows, and the binary. Those that are the same keep their time, which builds look at."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.split("\n")
    for source in [tree / name for name in listed if name] + binaries(tree):
        target = copy / source.relative_to(tree)
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def binaries(tree: Path) -> list[Path]:
    return list((tree / "dynops").glob("_C*.so"))


@contextlib.contextmanager
def planted(fault: Fault, copy: Path):
    """The fault in the copy, built if it is in C++, and removed afterwards."""
    file = fault.place(copy)
    text, sound = file.read_text(), {f: f.read_bytes() for f in binaries(copy)}
    try:
        file.write_text(text.replace(fault.old, fault.new))
        if file.suffix != ".py":
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            environment = {**os.environ, "FORCE_CUDA": "0", "PYTHONPATH": str(copy)}
            subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True)
        yield
    finally:
        file.write_text(text)
        for binary, content in sound.items():
            binary.write_bytes(content)


def fails(tests: str, copy: Path) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": str(int(INTERPRETED in tests))}
    files = [f"tests/{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "names", nargs="*", choices=[*FAULTS, []], metavar="NAME", help="faults; default: all"
    )
    parser.add_argument("--copy", type=Path, help="where the copy of the tree lies")
    arguments = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = arguments.copy or Path(folder)
        copy_of(ROOT, copy)
        for name in arguments.names or FAULTS:
            with planted(FAULTS[name], copy):
                found = fails(FAULTS[name].tests, copy)
            missed += not found
            print(f"{'found' if found else 'NOT FOUND':9} {name}", flush=True)
    print(f"{missed} of {len(arguments.names or FAULTS)} were not found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
