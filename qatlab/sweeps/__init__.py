"""Many runs: which cells a sweep has, how far each cell is, and how cells are started, here or on Slurm."""
