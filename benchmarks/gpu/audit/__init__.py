"""Compiles every GPU kernel ahead of time and checks what its machine code needs."""
