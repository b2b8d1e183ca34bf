"""What changes weights: adapters, stages, checkpoints, the training loop and the pipeline that chains them."""
