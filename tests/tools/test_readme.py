"""The README's Python examples run, one after the other."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 16
    names: dict = {}
    for block in blocks:
        if "from transformers" in block and find_spec("transformers") is None:
            continue  # it is optional
        exec(block, names)
    assert names["y"].shape == (2, 128, 56, 56)
    expected = names["stack"](names["frame"])
    torch.testing.assert_close(names["output"], expected, rtol=1e-4, atol=1e-5)
    assert 0 < names["plan"].density < 1
    assert names["packed"].shape == (2, 64, 56, 56) and names["h"].shape == (2, 128, 56, 56)
    torch.testing.assert_close(names["mixed"][0, :32], names["narrow"][0], rtol=1e-4, atol=1e-5)
    assert names["mixed"][0, 32:].count_nonzero() == 0
    assert "text" not in names or names["text"].shape == (1, 7)
    assert names["mixed_tokens"].shape == (2, 10, 64) and names["routed"].shape == (2, 32, 56, 56)
    assert names["skipped"].shape == (8, 64, 28, 28) and names["answers"].shape == (8, 10)
    assert names["macs"].per_sample.shape == (8,) and names["capped"].count_nonzero() <= 4
    assert names["halted"].shape == (8, 16) and names["read"].shape == (8, 50, 64)
