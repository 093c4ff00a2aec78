"""The harness: settings, timing, the one row type and its report."""
