"""Talking to checkpoints, in the terminal and on a local page, and people's choices between their replies."""
