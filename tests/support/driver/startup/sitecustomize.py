"""Python imports this first where its folder is on PYTHONPATH: then a process and all that it starts are on the stand-in."""

import driver.start  # noqa: F401
