"""Tests: the layout of the packages, house rules in `house/`, contracts over the registries in `contracts/`."""
