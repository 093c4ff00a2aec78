"""Networks that skip layers, stages or repetitions for some samples."""
