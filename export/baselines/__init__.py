"""Baselines of the benchmark that need PyTorch, and a cache of packages that are exported for benchmarks."""
