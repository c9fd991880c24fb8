"""Graphs rewritten for one backend, over the weight files of the package."""
