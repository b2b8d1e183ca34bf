"""Rows rendered, filtered and counted, over processes, once: from records to token ids on disk."""
