"""Weights in 8 or 4 bits: how they are rounded, and how a graph holds them."""
