"""PromPrune."""
