"""Adapter methods: which weights may change. One file per method; each registers itself."""
