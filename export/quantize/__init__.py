"""Weights in 8 or 4 bits: rounding them, and storing them in graphs."""
