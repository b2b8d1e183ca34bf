"""Trackers: where a run's numbers also go, beside `metrics.jsonl`. One file per tracker; each registers itself."""
