"""Numbers of a run on their way to metrics.jsonl, the terminal and trackers."""
