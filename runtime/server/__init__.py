"""An OpenAI-compatible server for packages, with continuous batching: ``promprune-serve``."""
