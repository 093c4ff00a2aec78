"""Convolutions on some channels of each sample, and with per-sample weights."""
