"""How much of a model's accuracy a selection keeps: data sets, the model in torch, its packages, and the comparison.

Needs what ``promprune.export`` needs.
"""
