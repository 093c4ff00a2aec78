"""Masks that cost no accuracy: masked pretraining, inputs that are sparse, images of different sizes."""
