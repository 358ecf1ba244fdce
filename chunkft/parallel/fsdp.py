"""FSDP2 as provider of weights: it gathers them when a layer computes; their gradients are ours, slice by slice."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from chunkft.autograd import Slice, SliceGradients, is_transformed, make_hollow, reached, record, records
from chunkft.autograd.hooks import Hook
from chunkft.bound import Bound
from chunkft.gathered import reshard, reshard_groups, sharded_groups
from chunkft.parallel.gathered_places import GatheredBound, GatheredPlaces
from chunkft.parallel.shards import Span, rows_of
from chunkft.places import Places
from chunkft.plan import ParameterSpec

CPU = torch.device("cpu")


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of a model is sharded by ``fully_shard``."""
    return any(group.fsdp_params for group in sharded_groups(model))


class ShardedWeights:
    """The weights of a model that ``fully_shard`` shards along dimension 0, and leaves without memory for their slices.

    FSDP2 gathers a module's parameters before it computes and frees them afterwards. They do not require grad, except
    for those with active slices, whose gradients are taken away before FSDP2 looks: it reduces none. A leaf has the
    shape of its slice, and its gradient is what this process computed for it, neither summed nor averaged.

    Args:
        model: on which ``fully_shard`` was called; no forward pass need have run.
        specs: of the parameters that are trained, each of its whole shape.

    Attributes:
        group: the processes that hold the shards, in their order.
        replicate_group: in hybrid sharding, those that hold the same shard as this one; None without.
        members: global ranks of all processes that have a part of the model, copies too.
        device: where the model computes.
        on_device: whether the shards are there as well (no ``CPUOffloadPolicy``).

    Raises:
        ValueError: if a parameter is not sharded, or otherwise than along dimension 0 over the group of all others, as
            by tensor parallelism, ``Shard(1)``, tensor subclasses that gather by themselves, or FSDP1.
    """

    copies = False  # the optimizer's leaves are views of the shards

    def __init__(self, model: nn.Module, specs: Sequence[ParameterSpec]) -> None:
        self.model = model
        self._specs = {spec.name: spec for spec in specs}
        _refuse_fsdp1(model)
        reshard(model)
        groups = list(sharded_groups(model))
        self._params = _matched(model, specs, groups)
        first = self._params[specs[0].name].mesh_info
        self.group: dist.ProcessGroup = first.shard_process_group
        self.replicate_group: dist.ProcessGroup | None = getattr(first, "replicate_process_group", None)
        self.rank: int = first.shard_mesh_rank
        self.members: list[int] = sorted(first.mesh.mesh.flatten().tolist())
        _initialise(model)
        self._groups = groups
        self.device: torch.device = next(iter(self._params.values())).device
        self.on_device = not any(param.offload_to_cpu for param in self._params.values())
        for param in self._params.values():
            _make_unsharded(param, self.group.size())
        self._rows = {spec.name: rows_of(spec.shape[0], self.group.size()) for spec in specs}
        self._leaves: dict[Slice, Tensor] = {}
        self._active: set[int] = set()  # ids of the groups with active weights
        self._group_of = {id(param): group for group in groups for param in group.fsdp_params}
        hook = _Reach(weakref.ref(self))
        self._groups_of: dict[nn.Module, set[int]] = {}  # ids, by module of ``fully_shard``
        for group in groups:
            for module in group.modules:
                self._groups_of.setdefault(module, set()).add(id(group))
        self._handles = [module.register_forward_hook(hook, prepend=True) for module in self._groups_of]

    def rows(self, name: str) -> list[Span]:
        """Global rows ``[start, stop)`` of a parameter that each rank of ``group`` holds; empty ones at the end."""
        return self._rows[name]

    def own(self, piece: Slice) -> Tensor:
        """The memory of a slice that lies in this rank's shard: a view, whose update is the update of the model.

        FSDP2 may move it when weights are loaded; then leaves are replaced (``Wiring.generation``).

        Raises:
            ValueError: if the slice does not lie in this rank's rows.
        """
        start, stop = self._rows[piece.name][self.rank]
        if piece.dim != 0 or not start <= piece.start < piece.stop <= stop:
            raise ValueError(f"slice {piece} is not in the rows [{start}, {stop}) of this rank's shard")
        param = self._params[piece.name]
        shard: Tensor = param._sharded_param_data.view(param.padded_sharded_param_size)
        return shard.detach().narrow(0, piece.start - start, piece.stop - piece.start)

    def wire_dtype(self, name: str) -> torch.dtype:
        """The dtype in which gradients of a parameter are handed on, and are to be sent.

        That is ``reduce_dtype`` of its ``MixedPrecisionPolicy``, else ``param_dtype``, else that of the parameter.
        """
        param = self._params[name]
        dtype: torch.dtype = param.reduce_dtype or param.param_dtype or param.orig_dtype
        return dtype

    def written(self) -> None:
        """Own rows were updated: modules that still hold gathered weights give them up, and gather anew when called."""
        reshard_groups(self._groups)

    def memory(self) -> dict[str, int]:
        """Bytes of the shards of this rank: see ``WeightStream.memory``; a gathered module comes on top of them."""
        params = {id(param): param for group in self._groups for param in group.fsdp_params}.values()
        sizes = [(p._sharded_param_data.numel() * p.orig_dtype.itemsize, p.offload_to_cpu) for p in params]
        return {
            "resident": sum(size for size, offloaded in sizes if not offloaded),
            "buffers": sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers()),
            "ring": 0,
            "tiles": 0,
            "host": sum(size for size, offloaded in sizes if offloaded),
        }

    def streams(self, name: str) -> bool:
        """Whether this is about a parameter at all."""
        return name in self._params

    def device_of(self, name: str) -> torch.device:
        """Where the shard of a parameter is, which is what is updated."""
        device: torch.device = self._params[name]._sharded_param_data.device
        return device

    def values(self, piece: Slice) -> Tensor:
        """The memory of a leaf, which is none: one element for all of its shape, on the device that computes."""
        if piece not in self._leaves:
            scalar = torch.empty((), dtype=self.wire_dtype(piece.name), device=self.device)
            self._leaves[piece] = scalar.expand(piece.shape)
        return self._leaves[piece]

    def made(self, piece: Slice, leaf: nn.Parameter, watcher: SliceGradients | None) -> None:
        """There is a leaf with this memory now."""
        make_hollow(leaf)
        self._active.add(id(self._group_of[id(self._params[piece.name])]))

    def settle(self) -> None:
        """Nothing of a shard is ever half moved."""

    def updating(self) -> None:
        """Shards are about to be changed."""

    def publish(self) -> None:
        """Shards were changed: see ``written``."""
        self.written()

    def forget(self) -> None:
        """The leaves are not used any more."""
        self._leaves.clear()
        self._active.clear()

    def nbytes(self) -> int:
        """Bytes on the device of leaves that are no part of a weight there: none."""
        return 0

    def bound(self, name: str) -> Bound:
        """What stands for a weight with active slices: the gathered one, which autograd sees."""
        return GatheredBound.of(self._params[name], cut_anyway=0 not in self._specs[name].dims)

    def places(self, specs: Sequence[ParameterSpec]) -> Places:
        """What looks for its parameters in the model, whichever of its forms modules hold."""
        return GatheredPlaces(self.model, specs, self._params)

    def leave(self) -> None:
        """The model is trained no more: parameters have their flags from their shards again, as FSDP2 keeps them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for param in self._params.values():
            record(param._unsharded_param, records(param.sharded_param))
        reshard_groups(self._groups)

    def reach(self, module: nn.Module, output: Any, inputs: Any) -> Any:
        """The output of a module of ``fully_shard`` whose backward pass all ranks come to, if its weights are active.

        A rank whose batch did not touch any of them, an expert's without tokens, would not gather the module in its
        backward pass, where the others wait for it.
        """
        if not torch.is_grad_enabled() or is_transformed():
            return None
        if self._active.isdisjoint(self._groups_of[module]):
            return None
        tensors = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point()]
        return None if any(one.requires_grad for one in tensors) else reached(output, module, inputs)


class _Reach(Hook):
    """Before the hook of FSDP2, which asks whether an output requires grad."""

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        weights = None if self.target is None else self.target()
        return None if weights is None else weights.reach(module, output, args)


def _initialise(model: nn.Module) -> None:
    """Let every outermost ``fully_shard`` settle its parts, as its first forward pass would.

    It has to be while all that is trained requires grad: it notes the dtypes of such parameters.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    for module in model.modules():
        state = _get_module_fsdp_state(module)
        if state is not None:
            state._lazy_init()


def _make_unsharded(param: Any, world: int) -> None:
    """Make the parameter that autograd sees, as the first gather would; its memory is freed again."""
    if hasattr(param, "_unsharded_param"):
        return
    dtype = param.param_dtype or param.orig_dtype
    with torch.inference_mode(False), torch.no_grad():
        param.init_all_gather_outputs([param._sharded_param_data.numel()], [dtype], world, param.device)
        param.init_unsharded_param()
        param.free_unsharded_param()


def _refuse_fsdp1(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model has a FullyShardedDataParallel at {name or 'its top'!r}, which is FSDP1 and flattens "
                "parameters; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _matched(model: nn.Module, specs: Sequence[ParameterSpec], groups: Sequence[Any]) -> dict[str, Any]:
    """The ``FSDPParam`` of each parameter by name.

    Raises:
        ValueError: for the first one that cannot be.
    """
    by_place = {place: param for group in groups for param in group.fsdp_params for place in _holders(param)}
    found: dict[str, Any] = {}
    for spec in specs:
        path, _, attribute = spec.name.rpartition(".")
        param = by_place.get((id(model.get_submodule(path)), attribute))
        why = _obstacle(param, None if not found else next(iter(found.values())))
        if why is not None:
            raise ValueError(f"parameter {spec.name!r} {why}")
        found[spec.name] = param
    return found


def _holders(param: Any) -> Iterator[tuple[int, str]]:
    info = param._module_info
    yield id(info.module), info.param_name
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        yield id(module), name


def _obstacle(param: Any, first: Any) -> str | None:
    """Why a parameter cannot be trained in slices of its shards, or None."""
    if param is None:
        return (
            "is trainable and not sharded by fully_shard, while others are: call fully_shard on the whole model too, "
            "or freeze it"
        )
    if param.is_dtensor:
        names = param.sharded_param.device_mesh.mesh_dim_names
        return f"is sharded by tensor parallelism too (mesh {names}); needs a mesh of fully_shard alone"
    if param.fsdp_placement.dim != 0:
        return f"is sharded by Shard({param.fsdp_placement.dim}); needs Shard(0)"
    if not hasattr(param.mesh_info, "shard_process_group"):
        return "is replicated and not sharded; needs a mesh with a dimension for shards"
    if hasattr(param._sharded_local_tensor, "fsdp_pre_all_gather"):
        kind = type(param._sharded_local_tensor).__name__
        return f"is a {kind}, which gathers in a form of its own (fsdp_pre_all_gather); needs plain tensors"
    if first is not None and param.mesh_info.mesh != first.mesh_info.mesh:
        return (
            f"is sharded over {param.mesh_info.mesh}, and others over {first.mesh_info.mesh}; needs one mesh"
        )
    return None
