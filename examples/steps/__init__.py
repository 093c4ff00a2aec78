"""Networks that skip steps in time."""
