"""Checkpoints at work: replies, scores, and several roles in one batch."""
