"""Stages: each turns a checkpoint and a data set into a checkpoint. One file per stage; each registers itself."""
