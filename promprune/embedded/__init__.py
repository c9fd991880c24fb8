"""Files that ship with promprune: the embedded model, and the questions that it is evaluated on."""
