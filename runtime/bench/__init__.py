"""Benchmarks of exported packages: measured time, counted work, baselines in the same run, and reports."""
