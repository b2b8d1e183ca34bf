"""Base models: where they lie, how they load, and the packed forward pass that every role shares."""
