"""Contenders of the benchmark that need PyTorch, and packages made for one."""
