"""Checks and measures on the GPU that is there."""

import time

BEGUN = time.monotonic()  # before torch is imported, which takes seconds of the budget
