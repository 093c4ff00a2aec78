"""Networks that compute some pixels."""
