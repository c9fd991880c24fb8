"""The exported package: its manifest, its engines, and where models come from."""
