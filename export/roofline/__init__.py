"""The work of a graph, and the ceilings of a device, which bound the time of that work."""
