"""Networks that compute some channels, or have weights of each sample."""
