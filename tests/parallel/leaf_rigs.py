"""What one rank does in the tests of leaves of sharded weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tiny_transformers import batch, build
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from chunkft.attach import Attachment, attach
from chunkft.autograd import compilable, records
from chunkft.parallel import ShardedWeights, expand, owner_of, shard_specs
from chunkft.partitions import make_plan
from chunkft.plan import ChunkPlan, check_plan


@dataclass(frozen=True)
class Setting:
    """A model and how it is sharded."""

    family: str
    world: int = 2
    chunks: int = 3
    changes: dict[str, Any] = field(default_factory=dict)
    reshard: bool | int = True
    reduced: bool = False  # computes in bf16, reduces in fp32
    offload: bool = False
    checkpointing: str = ""
    compiled: str = ""
    hybrid: bool = False
    double: bool = False  # for gradients that are zero but for rounding, as of BERT's key biases

    def __str__(self) -> str:
        parts = [self.family, str(self.world)]
        parts += [f"reshard={self.reshard}"] * (self.reshard is not True)
        parts += [name for name in ("reduced", "offload", "hybrid") if getattr(self, name)]
        parts += [one for one in (self.checkpointing, self.compiled) if one]
        return "-".join(parts)

    def mesh(self, group: dist.ProcessGroup) -> DeviceMesh:
        if self.hybrid:
            return init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("replicas", "shards"))
        return DeviceMesh.from_group(group, "cpu")

    def shard(self, model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
        options: dict[str, Any] = {"mesh": self.mesh(group), "reshard_after_forward": self.reshard}
        if self.reduced:
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for block in blocks(model):
            fully_shard(block, **options)
        fully_shard(model, **options)
        return model


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in found:
            for block in module:
                found.update(block.modules())
                yield block


def sharded(
    setting: Setting, group: dist.ProcessGroup, model: nn.Module
) -> tuple[Attachment, ShardedWeights]:
    setting.shard(model, group)
    attachment = attach(model)
    weights = ShardedWeights(model, attachment.specs)
    attachment.reside(weights)
    attachment.freeze()
    return attachment, weights


def plan_of(setting: Setting, attachment: Attachment, weights: ShardedWeights) -> ChunkPlan:
    specs = attachment.specs
    virtual = shard_specs(specs, weights.rows, weights.group.size())
    plan = make_plan(attachment.model, virtual, setting.chunks, "bytes", 0, None, row_multiple=1)
    return expand(plan, specs, weights.rows)


@contextmanager
def no_reduction() -> Iterator[None]:
    """FSDP2 has nothing to reduce."""

    def reduce(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("FSDP2 reduces gradients")

    before = _fsdp_param_group.foreach_reduce
    _fsdp_param_group.foreach_reduce = reduce
    try:
        yield
    finally:
        _fsdp_param_group.foreach_reduce = before


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.cat([one[name] for one in batches]) for name in batches[0]}


def dense_gradients(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    model(**joined(batches)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def summed(pairs: Any, weights: ShardedWeights, world: int) -> list[Tensor]:
    """The gradients of leaves, averaged over all ranks."""
    found = []
    for piece, leaf in pairs:
        wire = weights.wire_dtype(piece.name)
        gradient = torch.zeros(piece.shape, dtype=wire) if leaf.grad is None else leaf.grad
        assert gradient.dtype == wire
        assert gradient.is_contiguous()
        assert tuple(gradient.shape) == piece.shape
        total = gradient.clone()
        dist.all_reduce(total, group=None if world == dist.get_world_size() else weights.group)
        found.append(total / world)
    return found


def worst_error(group: dist.ProcessGroup, setting: Setting) -> float:
    """Greatest relative error of a slice's gradient over all chunks, of two passes each."""
    model = build(setting.family, **setting.changes).to(torch.float64 if setting.double else torch.float32)
    dense = copy.deepcopy(model)
    if setting.checkpointing == "library":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif setting.checkpointing == "wrapped":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
            checkpoint_wrapper,
        )

        inner = {id(block) for block in blocks(model)}
        apply_activation_checkpointing(model, checkpoint_wrapper, lambda module: id(module) in inner)
    attachment, weights = sharded(setting, group, model)
    if setting.compiled:
        compilable(model)
        for block in blocks(model):
            block.compile(backend=setting.compiled)
    plan = plan_of(setting, attachment, weights)
    check_plan(plan, [spec_with_rows(spec) for spec in attachment.specs])
    rank, world = dist.get_rank(group), group.size()
    names = {spec.name for spec in attachment.specs}
    worst = 0.0
    for chunk in plan:
        pairs = attachment.activate(chunk.slices)
        assert [piece for piece, _ in pairs] == list(chunk.slices)
        active = {piece.name for piece in chunk.slices}
        for number in range(2):
            batches = [batch(setting.family, 10 * number + one) for one in range(world)]
            with no_reduction():
                model(**batches[rank]).loss.backward()
            expected = {
                name.replace("_checkpoint_wrapped_module.", ""): gradient
                for name, gradient in dense_gradients(dense, batches).items()
            }
            dense.zero_grad()
            largest = max(gradient.norm() for gradient in expected.values())
            for piece, gradient in zip(chunk.slices, summed(pairs, weights, world), strict=True):
                want = piece.of(expected[piece.name.replace("_checkpoint_wrapped_module.", "")])
                scale = max(want.norm(), 1e-4 * largest)
                worst = max(worst, float((gradient - want).norm() / scale))
            for _, leaf in pairs:
                leaf.grad = None
            for name, parameter in model.named_parameters():
                assert parameter.grad is None, name
                if name in names:
                    assert records(parameter) == (name in active), name
    attachment.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "_chunkft" not in model.__dict__
    return worst


def spec_with_rows(spec: Any) -> Any:
    from dataclasses import replace

    return replace(spec, dims=(0,))


def losses_around_an_update(group: dist.ProcessGroup, setting: Setting) -> tuple[float, float, float]:
    """Loss before and after all own rows were changed, and that of a model that was changed as a whole."""
    model = build(setting.family)
    changed = copy.deepcopy(model)
    attachment, weights = sharded(setting, group, model)
    plan = plan_of(setting, attachment, weights)
    own = batch(setting.family)
    attachment.activate(plan.chunks[0].slices)
    before = float(model(**own).loss)
    with torch.no_grad():
        for piece in plan.slices():
            if owner_of(piece, weights.rows) == weights.rank:
                weights.own(piece).mul_(1.5)
        weights.written()
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    return before, float(model(**own).loss), float(changed(**own).loss)
