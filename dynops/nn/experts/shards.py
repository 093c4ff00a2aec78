"""Wraps a model with sharded experts: data parallelism, clipping, and state dicts of the whole."""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from .parallel import ParallelExperts, expert_range


def _layers(model: nn.Module) -> dict[str, ParallelExperts]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if isinstance(m, ParallelExperts)}


# ------------------------------------------------------------------------------- data parallelism


def prepare_ddp(model: nn.Module, replicas: dist.ProcessGroup | None = None) -> None:
    """Prepares ``model`` for ``DistributedDataParallel``; call it once, before wrapping the model.

    DistributedDataParallel leaves the shards of experts alone afterwards: it neither sends rank 0's experts to the others nor
    averages gradients of different experts. Their gradients, which are sums over the ranks of the experts' group, become means
    over all ranks as DistributedDataParallel makes of the others.

    Args:
        model: what goes into ``DistributedDataParallel(model)``.
        replicas: the process group of the ranks that hold the same experts as this one: they start from those of its first
            rank, and gradients are averaged over it too. None: there are no others, the experts' group is the default one.

    Raises:
        ValueError: there are others, but no ``replicas``; or the model is prepared already.
    """
    names, ranks = [], {}
    for layer, module in _layers(model).items():
        size = dist.get_world_size(module.group)
        if replicas is None and size != dist.get_world_size():
            raise ValueError(
                "replicas: expected the process group of the ranks that hold the same experts, as the experts are "
                f"sharded over {size} of {dist.get_world_size()} ranks; got None"
            )
        copies = 1 if replicas is None else dist.get_world_size(replicas)
        ranks |= {parameter: size * copies for parameter in module.parameters() if parameter.requires_grad}
        tensors = (*module.named_parameters(), *module.named_buffers())
        names += [f"{layer}.{name}" if layer else name for name, _ in tensors]
        for _, tensor in tensors if replicas is not None else ():
            dist.broadcast(tensor.detach(), group=replicas, group_src=0)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    if set(names) & set(ignored):
        raise ValueError("model: expected one that is not prepared yet")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*ignored, *names])
    for parameter, count in ranks.items():
        parameter.register_hook(functools.partial(_mean, ranks=count, replicas=replicas))


def _mean(grad: Tensor, ranks: int, replicas) -> Tensor:
    grad = grad / ranks
    if replicas is not None:
        dist.all_reduce(grad, group=replicas)
    return grad


def prepare_fsdp(model: nn.Module, mesh: DeviceMesh, **options) -> None:
    """``fully_shard`` for the experts; ``fully_shard(model)`` then takes the rest.

    Their parameters are sharded a second time, over the ranks that hold the same experts. Their gradients
    become means over all ranks, as those of the rest do. ``fully_shard`` takes the values that each rank has:
    seed the ranks alike, or load.

    Args:
        model: before ``fully_shard``.
        mesh: the dimension of those ranks (one rank if there are no others).
        options: of ``torch.distributed.fsdp.fully_shard``.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(model).values():
        ranks = dist.get_world_size(layer.group)
        # not set_gradient_divide_factor: torch 2.13 divides float16 and float64 by it twice where the mesh has one rank
        fully_shard(layer.experts, mesh=mesh, **options).set_all_reduce_hook(
            lambda grad, n=ranks: grad.div_(n)
        )


# ---------------------------------------------------------------------------------------- clipping


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of all parameters, where each rank has other experts; collective.

    That function would see the experts of one rank: the ranks would scale what they share by different factors, and their
    copies would part. Gradients may be ``DTensor``, as ``fully_shard`` has them.

    Returns:
        The norm of all gradients, with each expert counted once; the same on every rank.
    """
    groups = {parameter: m.group for m in _layers(model).values() for parameter in m.parameters()}
    shards: dict[dist.ProcessGroup | None, list[Tensor]] = {group: [] for group in (None, *groups.values())}
    for parameter in model.parameters():
        if parameter.grad is not None:
            shards[groups.get(parameter)].append(parameter.grad)
    norms, device = [], next(model.parameters()).device
    for group, grads in shards.items():
        norm = _whole(torch.nn.utils.get_total_norm(grads, norm_type))
        norm = norm.to(device, torch.promote_types(norm.dtype, torch.float32))
        if group is not None and math.isinf(norm_type):
            dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        elif group is not None:
            norm = norm**norm_type
            dist.all_reduce(norm, group=group)
            norm = norm ** (1 / norm_type)
        norms.append(norm)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for grads in shards.values():
        for grad in grads:
            getattr(grad, "_local_tensor", grad).mul_(factor)
    return total


# ------------------------------------------------------------------------------------- state dicts


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` as one process without sharded experts has it, on every rank; collective.

    The experts of all ranks are put together under the keys of :class:`Experts`. ``DTensor``, as ``fully_shard`` has them,
    become whole tensors.
    """
    layers, whole = _layers(model), {}
    for key, value in model.state_dict().items():
        value = _whole(value)
        layer, name = _split(key, layers)
        whole[name] = value if layer is None else _gathered(value, layers[layer])
    return whole


def shard_state_dict(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a :func:`full_state_dict`: what ``model.load_state_dict`` takes; views of ``whole``.

    Keys of the model that ``whole`` does not have are left out, and what it has beyond the model stays, so that
    ``load_state_dict`` reports both.
    """
    layers, part = _layers(model), dict(whole)
    for key in model.state_dict():
        layer, name = _split(key, layers)
        if layer is not None and name in part:
            own = layers[layer].local
            part[key] = part.pop(name)[own.start : own.stop]
    return part


def _split(key: str, layers: dict[str, ParallelExperts]) -> tuple[str | None, str]:
    """The ParallelExperts that a key of the model belongs to, or None, and the key in a model without it."""
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        if key.startswith(f"{prefix}experts."):
            return layer, prefix + key.removeprefix(f"{prefix}experts.")
    return None, key


def _gathered(own: Tensor, layer: ParallelExperts) -> Tensor:
    whole = own.new_empty(layer.num_experts, *own.shape[1:])
    ranks = dist.get_world_size(layer.group)
    for rank in range(ranks):
        shard = expert_range(layer.num_experts, rank, ranks)
        part = whole[shard.start : shard.stop]
        if shard == layer.local:
            part.copy_(own)
        dist.broadcast(part, group=layer.group, group_src=rank)
    return whole


def _whole(value: Tensor) -> Tensor:
    """``value`` itself, or the whole tensor of a DTensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
