"""What every package may use: errors, files, signals, processes, hashes. Importing these modules imports no torch."""
