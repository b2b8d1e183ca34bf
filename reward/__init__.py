"""What is good: scores, losses, reward shaping and statistics (no loop, no checkpoint I/O, no adapters)."""
