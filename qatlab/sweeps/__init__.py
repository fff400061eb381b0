"""Many runs: which they are, how far each is, and how they are started, here or on Slurm."""
