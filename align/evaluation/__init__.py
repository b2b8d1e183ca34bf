"""Measuring checkpoints beside their replies: benchmarks, judges, and pairs for reward models."""
