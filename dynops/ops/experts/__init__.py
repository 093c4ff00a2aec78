"""Products of each token with its experts' weights."""
