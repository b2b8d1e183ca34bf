"""Signals: what a policy is rewarded for. One file here is one kind of signal; it registers itself (`base.py`)."""
