"""The page at ``/``: an image, a question, and the answers of two models with the tokens that they keep."""
