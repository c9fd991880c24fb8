"""The work of a graph, and the fastest that a device can do it."""
