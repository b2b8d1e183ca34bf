"""Modules that adapters insert into a tree; everything here needs torch."""
