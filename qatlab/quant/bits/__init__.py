"""Mixed precision: how many bits each layer gets under a budget."""
