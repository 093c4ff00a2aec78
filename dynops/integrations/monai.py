"""An inferer for MONAI: :func:`dynops.tiles` in the place of a sliding window, for images ``[N, C, H, W]``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..tiling.run import Job


class TileInferer(Inferer):
    """Runs a network tile by tile, only where a mask is active, and exactly where the network is local::

        inferer = TileInferer(roi_size=512, mask=lambda image: image.mean(1) < 0.9)
        prediction = inferer(inputs=image, network=model)

    As ``monai.inferers.SlidingWindowInferer`` it is called with the images and the network, and works in evaluators. How far a
    network sees is measured at its first call: make a new inferer where its layers change.

    Args:
        roi_size: pixels along a side, or (height, width).
        sw_batch_size: tiles of one size that run at once.
        overlap: of windows that are blended: a share below 1, or pixels as an int.
        mask: from the images to their mask ``[N, h, w]``, of any resolution; None: all of them.
        exact: as for :func:`dynops.tiles`.
        progress: shows a bar of the tiles.

    Raises:
        ValueError: when called with anything but ``[N, C, H, W]``; and what :func:`dynops.tiles` raises.
    """

    def __init__(
        self,
        roi_size: int | tuple[int, int],
        sw_batch_size: int = 4,
        overlap: float = 0.25,
        mask: Callable[[Tensor], Tensor] | None = None,
        exact: bool | None = None,
        progress: bool = False,
    ):
        super().__init__()
        self.roi_size, self.sw_batch_size, self.overlap = roi_size, sw_batch_size, overlap
        self.mask, self.exact, self.progress = mask, exact, progress
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __call__(self, inputs: Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs for ``inputs`` ``[N, C, H, W]``; further arguments go to the network."""
        if inputs.dim() != 4:
            raise ValueError(f"inputs: expected [N, C, H, W], got shape {tuple(inputs.shape)}")
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        mask = None if self.mask is None else self.mask(image)
        run = (lambda x: network(x, *args, **kwargs)) if args or kwargs else network
        job = Job(run, image, mask, None, None, False, self.sw_batch_size, self.progress, None)
        if isinstance(network, nn.Module):
            job.known = self._known.setdefault(network, {})
        out = job.run_all(self.roi_size, self.exact, self.overlap)
        if not isinstance(inputs, MetaTensor):
            return out
        return pytree.tree_map_only(Tensor, lambda y: convert_to_dst_type(y, inputs, dtype=y.dtype)[0], out)
