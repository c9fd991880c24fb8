"""Measuring how much accuracy a model keeps with fewer tokens: data sets, the model in torch, packages, comparisons.

Needs the ``[export]`` extra.
"""
