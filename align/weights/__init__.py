"""Checkpoints into other forms, and numbers about them: merge, export, extract, compress, count."""
