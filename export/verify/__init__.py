"""Verification of a package."""
