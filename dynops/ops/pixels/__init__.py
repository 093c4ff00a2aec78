"""Convolutions on the pixels of a plan, and the rows that they are packed in."""
