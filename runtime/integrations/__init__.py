"""Using packages in other projects: vLLM and lmms-eval."""
