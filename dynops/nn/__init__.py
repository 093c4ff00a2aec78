"""Layers: each takes the place of an ordinary one, with its constructor, parameters and keys."""
