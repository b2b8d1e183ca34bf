"""What is wrong with a run before anything is trained."""
