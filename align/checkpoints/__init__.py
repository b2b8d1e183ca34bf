"""What is saved of a stage, what it stands on, and whether a chain of them is legal."""
