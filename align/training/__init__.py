"""The optimisation loop: batches, objectives, optimiser, state to go on from."""
