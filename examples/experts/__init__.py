"""Networks of experts, of which each token or sample runs some."""
