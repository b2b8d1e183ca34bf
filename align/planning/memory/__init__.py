"""What a stage holds in memory, and what its passes add. The files of this folder need torch."""
