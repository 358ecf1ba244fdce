"""Models whose weights are sharded over the ranks by FSDP2: sharding, and whole weights out of and into the shards."""

from typing import Any

import torch
from torch import nn

from chunkft.cli.errors import UserError
from chunkft.weights.units import block_names

__all__ = ["load_whole", "shard", "shards_of", "whole_weights"]


def shard(model: Any, device: torch.device, adds_up: bool) -> None:
    """Shard a model on the CPU over all ranks by `fully_shard`, its blocks one by one and then the rest, in place.

    16-bit weights keep their dtype. Each block moves to ``device`` as a whole before its shard is cut from it, so that
    no more than one is there at a time.

    Args:
        model: that has blocks.
        device: where shards are.
        adds_up: whether gradients of 16-bit weights are to be fp32 from the start, because FSDP2 reduces them, or those
            of several passes are added; else they travel in 16 bits, and ours are summed in fp32 where they arrive.

    Raises:
        UserError: if the model has no blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    try:
        names = block_names(model)
    except ValueError as error:
        raise UserError(f"--fsdp: {error}") from error
    dtype = next(model.parameters()).dtype
    half = dtype in (torch.bfloat16, torch.float16)
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if adds_up else None)
        if half
        else MixedPrecisionPolicy()
    )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shards_of(model: nn.Module) -> list[torch.Tensor]:
    """What this rank has of each weight; whole those that are not sharded."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters()]


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor] | None:
    """The state dict of a sharded model with whole tensors on the CPU; every rank must call this.

    Weights are gathered one after another, so that a device holds one of them as a whole.

    Args:
        model: whose weights are shards.
        keep: whether this rank wants them; others get None. Tied weights stay one tensor.
    """
    kept: dict[str, torch.Tensor] = {}
    names = {id(weight): name for name, weight in model.named_parameters()}
    tied = {name: names[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
    first: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        source = tied.get(name, name)
        if source in first:
            if keep:
                kept[name] = first[source]
            continue
        whole = value.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        first[source] = whole.cpu() if keep else torch.empty(0)
        if keep:
            kept[name] = first[source]
    return kept if keep else None


@torch.no_grad()
def load_whole(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put whole weights, the same on each rank, into the shards of a model.

    Raises:
        ValueError: if names or shapes differ; nothing is changed then.
    """
    own = model.state_dict()
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())[0]
        raise ValueError(f"weight {odd!r} is in one of the model and the checkpoint only")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(weights[name].shape)} in the checkpoint, {tuple(value.shape)} in the"
                " model"
            )
    for name, value in own.items():
        if not hasattr(value, "to_local"):
            value.copy_(weights[name])
            continue
        rank, world = value.device_mesh.get_local_rank(), value.device_mesh.size()
        parts = torch.chunk(
            weights[name], world, dim=0
        )  # as fully_shard cuts: the last ranks may get nothing
        if rank < len(parts):
            value.to_local().copy_(parts[rank])
