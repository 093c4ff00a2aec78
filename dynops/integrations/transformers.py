"""transformers: ``experts_implementation="dynops"`` for mixtures of experts, ``pixel_mask`` for the backbones of DETR."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ..convert import Report


def register(name: str = "dynops") -> None:
    """Registers dynops as an implementation of experts in transformers. Again: the same.

    One line before a model is made, or changed afterwards::

        dynops.integrations.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="dynops")
        model.set_experts_implementation("dynops")  # a model that is there already

    Every model whose experts use transformers' interface runs on :func:`dynops.ops.experts_mlp`, forward and
    backward. Its parameters, checkpoints and outputs stay: biases, transposed and interleaved weights, experts without a
    gate, a norm after each expert and tokens that are dropped (an index of ``num_experts``) are honoured. The
    activation is fused where dynops has it; a gate of the model's own is called between the two GEMMs.

    Some models have experts that do not use that interface (Llama 4, Switch Transformers, NLLB-MoE). Such a
    model runs as before, and warns with its name and the reason when it is made or set.

    Args:
        name: what ``experts_implementation`` is to be.

    Raises:
        ImportError: transformers is not installed, or older than 5.7: it would refuse the name.
        ValueError: another implementation has this name.
    """
    _check_version()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from .transformers_experts import experts_forward
    from .transformers_notice import notice

    taken = "eager" if name == "eager" else ALL_EXPERTS_FUNCTIONS.get(name, experts_forward)
    if taken is not experts_forward:
        raise ValueError(f"name: expected one that no other implementation of experts has, got {name!r}")
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    notice(name)


def use_pixel_mask(model: nn.Module) -> Report:
    """Makes the backbone of a DETR compute each image's pixels only, and not the padding of the batch, in place::

        dynops.integrations.transformers.use_pixel_mask(model)
        outputs = model(pixel_values, pixel_mask)

    ``pixel_mask`` is what the image processor returns: 1 on each image, which lies in the top left corner, and 0 on the padding,
    where ``pixel_values`` are 0. The edge of the mask is the edge of the image for each layer, as in :func:`dynops.ragged`. So
    the encoder gets the maps and masks of each image alone, where transformers' own convolutions read the padding after
    the first norm, and its masks may have a row too many. For DETR, Conditional DETR, DAB-DETR, Deformable DETR, Table
    Transformer, RT-DETR and others with such a ``...ConvEncoder``, on a convolutional backbone of transformers or timm.

    What follows the backbone is transformers': layers that convolve its maps again, as those of RT-DETR and of segmentation
    heads, read zeros beyond an image. ``dynops.revert_(model)`` undoes it.

    Args:
        model: a model with one such backbone.

    Returns:
        What :func:`dynops.convert_` reports of the backbone.

    Raises:
        TypeError: no module, or one with no or several such backbones.

    Paper: Carion et al., End-to-End Object Detection with Transformers (ECCV 2020).
    """
    from .transformers_pixels import use_pixel_mask as convert

    return convert(model)


def _check_version() -> None:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "register: expected transformers >= 5.7, which is not installed (pip install 'dynops[transformers]')"
        ) from error
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if (major, minor) < (5, 7):
        raise ImportError(f"register: expected transformers >= 5.7, got {transformers.__version__}")
