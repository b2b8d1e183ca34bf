"""Data as a user works on it outside a run: statistics and conversion."""
