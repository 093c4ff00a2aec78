"""Registers an op under ``torch.ops.dynops``: its schema, its reference, its fake."""

from __future__ import annotations

from collections.abc import Callable

import torch

library = torch.library.Library("dynops", "FRAGMENT")


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Defines ``dynops::<schema>`` with a Python implementation for every device.

    A kernel that the binary registers for one device goes before it.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dynops::{name}", fake, lib=library)
