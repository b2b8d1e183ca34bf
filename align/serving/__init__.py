"""Talking to checkpoints, in the terminal and on a local page."""
