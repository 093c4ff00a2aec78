"""Forwards recorded as graphs, and the fusion of their steps."""
