"""Hydra recipes: what can be run. Installed as `align.recipes`."""
