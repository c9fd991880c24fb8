"""The commands that make, verify and evaluate packages."""
