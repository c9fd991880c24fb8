"""Rewriting graphs for one backend; they use the weight files of the package."""
