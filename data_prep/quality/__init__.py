"""What can be wrong with rows that are well formed: repeated, leaked, contradictory, biased. No models."""
