"""Generators: data sets that are computed instead of read from files (Registry "generator")."""
