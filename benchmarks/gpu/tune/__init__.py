"""Searches tiles and break-even densities for the GPU that is there."""
