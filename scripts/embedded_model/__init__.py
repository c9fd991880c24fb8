"""Making the embedded model: its architecture and files, its data, its training stages and its evaluation."""
