"""The commands that run packages."""
