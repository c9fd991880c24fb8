"""Packages in other projects: vLLM, lmms-eval."""
