"""Convolutions that compute only the output pixels of a mask, in place of ``nn.Conv2d`` and its transpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import context
from ...ops import sparse_conv2d, sparse_conv_transpose2d
from ...plans import PixelPlan, as_pixel_plan, named
from ...stack.maps import layer_input
from ...stack.module_geometry import conv_geometry, conv_transpose_geometry
from ..from_dense import FromDense, conv_options, with_batch


class _SparseConv(FromDense):
    """Base of the two layers: the mask, ``from_dense``."""

    def _plan(self, x: Tensor, mask_or_plan, output_padding=None) -> PixelPlan | None:
        """The plan that a call is for: the one passed, else that of ``dynops.use_mask``, else None."""
        if mask_or_plan is not None:
            return as_pixel_plan(mask_or_plan, batch=x.shape[0])
        active = context.current()
        if active is None:
            return None
        in_shape = (x.shape[0], x.shape[2], x.shape[3])
        if isinstance(self, nn.ConvTranspose2d):
            geometry = conv_transpose_geometry(self, in_shape, output_padding)
        else:
            geometry = conv_geometry(self, in_shape)
        return active.after(geometry, x.device)


def _epilogue(batched: bool, gate, residual, base) -> dict:
    """The keyword arguments of an op; those of an unbatched call gain their batch."""
    if not batched:
        gate = gate[None] if isinstance(gate, Tensor) and gate.dim() > 1 else gate
        residual = residual[None] if isinstance(residual, Tensor) and residual.dim() == 3 else residual
        base = base[None] if isinstance(base, Tensor) and base.dim() == 3 else base
    return {"gate": gate, "residual": residual, "base": base}


def _need_no_mask(**arguments) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: expected a mask with it (without one the layer is the dense layer)")


class SparseConv2d(_SparseConv, nn.Conv2d):
    """``nn.Conv2d`` that computes only the output pixels of a mask.

    Constructor, parameters and ``state_dict`` are those of ``nn.Conv2d``; so is the result, bit for
    bit, where there is no mask. Called as ``layer(x, mask_or_plan)``; without that argument inside
    ``with dynops.use_mask(mask):`` the mask is the active one, moved to the output's resolution.

    Shape:
        - input: ``[N, C, H, W]`` (channels_last is the fast format) or ``[C, H, W]``.
        - mask_or_plan: ``[N, out_H, out_W]`` or ``[N, 1, out_H, out_W]``, or one for all samples:
          ``[out_H, out_W]`` or N = 1. Nonzero = computed. Or a :class:`dynops.PixelPlan`, of the batch
          or of a batch of 1, which is cheaper where several layers share the mask. It gets no gradient: a gate
          that is trained is passed as ``gate`` too.
        - gate: ``[N, out_H, out_W]``, ``[N, 1, out_H, out_W]`` or packed ``[P]``, a multiplier of each computed
          pixel, through which a gate's gradient flows.
        - residual: ``[N, O, out_H, out_W]``, added at the computed pixels.
        - base: ``[N, O, out_H, out_W]``, the output at all others; zero if None.
        - output: ``where(mask, gate * conv(input) + residual, base)``, format and dtype of ``input``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Verelst and Tuytelaars, Dynamic Convolutions (CVPR 2020).
    """

    _dense = nn.Conv2d
    pixels_of = nn.Conv2d

    def forward(
        self,
        input: Tensor,
        mask_or_plan: Tensor | PixelPlan | None = None,
        *,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        if mask_or_plan is None and context.current() is None:
            _need_no_mask(gate=gate, residual=residual, base=base)
            return nn.Conv2d.forward(self, input)
        if (
            _is_plain(mask_or_plan, gate, residual, base)
            and (x := layer_input(input, context.current())) is not None
        ):
            return nn.Conv2d.forward(self, x)
        x, batched = with_batch(input)
        out = named(
            "mask_or_plan",
            "plan",
            sparse_conv2d,
            x,
            self.weight,
            self.bias,
            self._plan(x, mask_or_plan),
            **conv_options(self),
            **_epilogue(batched, gate, residual, base),
        )
        return out if batched else out[0]


class SparseConvTranspose2d(_SparseConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that computes only the output pixels of a mask.

    As :class:`SparseConv2d`, with the constructor of ``nn.ConvTranspose2d`` and its ``output_size``
    argument, which may be the second positional one, as there.
    """

    _dense = nn.ConvTranspose2d
    pixels_of = nn.ConvTranspose2d

    def forward(
        self,
        input: Tensor,
        mask_or_plan: Tensor | PixelPlan | None = None,
        output_size: list[int] | None = None,
        *,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        if isinstance(mask_or_plan, (list, tuple, torch.Size)):  # nn.ConvTranspose2d(input, output_size)
            mask_or_plan, output_size = None, list(mask_or_plan)
        if mask_or_plan is None and context.current() is None:
            _need_no_mask(gate=gate, residual=residual, base=base)
            return nn.ConvTranspose2d.forward(self, input, output_size)
        if (
            _is_plain(mask_or_plan, gate, residual, base)
            and (x := layer_input(input, context.current())) is not None
        ):
            return nn.ConvTranspose2d.forward(self, x, output_size)
        x, batched = with_batch(input)
        output_padding = tuple(
            self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
        )
        out = named(
            "mask_or_plan",
            "plan",
            sparse_conv_transpose2d,
            x,
            self.weight,
            self.bias,
            self._plan(x, mask_or_plan, output_padding),
            stride=self.stride,
            padding=self.padding,
            output_padding=output_padding,
            groups=self.groups,
            dilation=self.dilation,
            **_epilogue(batched, gate, residual, base),
        )
        return out if batched else out[0]


def _is_plain(*arguments) -> bool:
    """True for a call with nothing but the input."""
    return all(argument is None for argument in arguments)
