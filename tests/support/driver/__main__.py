"""``python -m driver ARGUMENTS``: pytest on the stand-in."""

import sys

import pytest

from . import start  # noqa: F401  before pytest's plugins, which may import torch

sys.exit(pytest.main(sys.argv[1:]))
