"""A module as a graph of layers, run on rows or on tiles."""
