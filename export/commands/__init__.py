"""The commands that export, verify and evaluate packages, and build engines."""
