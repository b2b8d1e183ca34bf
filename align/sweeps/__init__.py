"""Many runs of one recipe: jobs, what they share, and how they compare."""
