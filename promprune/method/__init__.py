"""PromPrune's selection: the reference in float64, and its batched form."""
