"""Vision towers of the LLaVA families."""
