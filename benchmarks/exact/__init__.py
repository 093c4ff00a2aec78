"""Masks that cost no accuracy: masked pretraining, inputs that are sparse, images of different sizes."""


def uncached() -> None:
    """In place of the flush of a cold row: calls of a second follow another contender's, and none of their own that is not timed."""
