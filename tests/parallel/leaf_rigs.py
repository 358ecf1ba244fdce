"""What one rank does in the tests of leaves of sharded weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from rigs import blocks
from tiny_transformers import batch, build
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
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
    check_plan(plan, [replace(spec, dims=(0,)) for spec in attachment.specs])
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


class Choosy(nn.Module):
    """Computes with one layer where a batch has an even number of rows, and with another one where it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(6, 6)
        self.odd = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.even if len(x) % 2 == 0 else self.odd
        return self.norm(x + chosen(x))


class Reader(nn.Module):
    """Reads the weight of a layer that it never calls, and has an attention and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 7)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.layer.weight) @ self.layer.weight
        y = y + self.attention(x, x, x, need_weights=False)[0] * self.scale
        return torch.nn.functional.linear(torch.tanh(y), self.layer.weight, self.layer.bias)


def errors_of(
    group: dist.ProcessGroup, model: nn.Module, inputs: list[Tensor], chunks: int = 3
) -> list[tuple[str, float]]:
    """Absolute error of each window's gradient, of a module whose children are sharded one by one."""
    dense = copy.deepcopy(model)
    attachment, weights = sharded(_Children("", group.size(), chunks), group, model)
    plan = plan_of(Setting("", group.size(), chunks), attachment, weights)
    for x in inputs:
        (dense(x).square().sum() / len(inputs)).backward()
    expected = {name: p.grad for name, p in dense.named_parameters()}
    found = []
    for chunk in plan:
        pairs = attachment.activate(chunk.slices)
        with no_reduction():
            model(inputs[dist.get_rank(group)]).square().sum().backward()
        for piece, gradient in zip(chunk.slices, summed(pairs, weights, group.size()), strict=True):
            want = piece.of(expected[piece.name])
            found.append((str(piece), float((gradient - want).abs().max())))
        for _, leaf in pairs:
            leaf.grad = None
    return found


class _Children(Setting):
    def shard(self, model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
        for child in model.children():
            fully_shard(child, mesh=self.mesh(group))
        return model  # every child is a root of its own


def chosen_layers(group: dist.ProcessGroup) -> list[tuple[str, float]]:
    """Every rank computes with a layer of its own in each block."""
    torch.manual_seed(1)
    model = nn.Sequential(Choosy(), Choosy(), Choosy()).double()
    return errors_of(group, model, [torch.randn(4 + rank, 6).double() for rank in range(2)], 12)


def read_weights(group: dist.ProcessGroup) -> tuple[list[tuple[str, float]], list[str]]:
    """Errors, and what was said of weights that are read without their modules."""
    torch.manual_seed(1)
    model = nn.Sequential(Reader(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = errors_of(group, model, [torch.randn(2, 4, 6).double() for _ in range(2)], 7)
    messages = [str(one.message) for one in said]
    return found, [message for message in messages if "without a call of the module" in message]


def reach_of_backward(group: dist.ProcessGroup) -> list[list[bool]]:
    """By chunk, which blocks have an output that requires grad."""
    setting = Setting("llama", 2, chunks=4, changes={"num_hidden_layers": 4})
    model = build(setting.family, **setting.changes)
    attachment, weights = sharded(setting, group, model)
    found: list[list[bool]] = []
    for block in blocks(model):
        block.register_forward_hook(lambda module, args, output: found[-1].append(output.requires_grad))
    for chunk in plan_of(setting, attachment, weights):
        attachment.activate(chunk.slices)
        found.append([])
        model(**batch(setting.family)).loss.backward()
    return found


def precision(group: dist.ProcessGroup) -> tuple[float, set[torch.dtype]]:
    """Greatest error relative to a dense gradient in fp32 when computed in bf16, and the dtypes of gradients."""
    setting = Setting("llama", 2, reduced=True)
    model = build(setting.family)
    dense = copy.deepcopy(model)
    attachment, weights = sharded(setting, group, model)
    batches = [batch(setting.family, rank) for rank in range(2)]
    expected = dense_gradients(dense, batches)
    worst, dtypes = 0.0, set()
    for chunk in plan_of(setting, attachment, weights):
        pairs = attachment.activate(chunk.slices)
        with no_reduction():
            model(**batches[dist.get_rank(group)]).loss.backward()
        dtypes |= {leaf.grad.dtype for _, leaf in pairs}
        assert all(
            weights.own(piece).dtype == torch.float32
            for piece in chunk.slices
            if owner_of(piece, weights.rows) == weights.rank
        )
        for piece, gradient in zip(chunk.slices, summed(pairs, weights, 2), strict=True):
            want = piece.of(expected[piece.name])
            scale = max(want.norm(), 0.05 * expected[piece.name].norm())
            worst = max(worst, float((gradient - want).norm() / scale))
        for _, leaf in pairs:
            leaf.grad = None
    return worst, dtypes


def loaded_weights(group: dist.ProcessGroup, assign: bool) -> tuple[int, float, float, bool, list[str]]:
    """Weights are loaded while slices are active: generations, two losses, whether gradients flow, who else records."""
    setting = Setting("llama", 3)
    model = build(setting.family)
    torch.manual_seed(7)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    attachment, weights = sharded(setting, group, model)
    donor = setting.shard(copy.deepcopy(other), group)
    plan = plan_of(setting, attachment, weights)
    pairs = attachment.activate(plan.chunks[0].slices)
    own = batch(setting.family)
    model(**own).loss.backward()
    before = attachment.wiring.generation
    model.load_state_dict(donor.state_dict(), assign=assign)
    attachment.verify()
    loss = model(**own).loss
    for _, leaf in pairs:
        leaf.grad = None
    loss.backward()
    flows = any(leaf.grad is not None and bool(leaf.grad.any()) for _, leaf in pairs)
    for piece in plan.slices():
        if owner_of(piece, weights.rows) == weights.rank:
            assert torch.equal(
                weights.own(piece), piece.of(dict(other.named_parameters())[piece.name].detach())
            )
    active = {piece.name for piece, _ in pairs}
    others = [name for name, p in model.named_parameters() if records(p) and name not in active]
    attachment.detach()
    others += [name for name, p in model.named_parameters() if not p.requires_grad]
    generations = attachment.wiring.generation - before
    return generations, float(loss), float(other(**own).loss), flows, others


def evaluation_between(group: dist.ProcessGroup) -> tuple[float, float]:
    """An evaluation leaves the outermost module gathered; what is attached and activated then works all the same."""
    setting = Setting("gpt2", 2)
    model = build(setting.family)
    dense = copy.deepcopy(model)
    setting.shard(model, group)
    own = batch(setting.family)
    with torch.no_grad():
        model(**own)
    attachment = attach(model)
    weights = ShardedWeights(model, attachment.specs)
    attachment.reside(weights)
    attachment.freeze()
    plan = plan_of(setting, attachment, weights)
    worst = 0.0
    batches = [batch(setting.family, rank) for rank in range(2)]
    expected = dense_gradients(dense, batches)
    for chunk in plan:
        with torch.no_grad():
            model(**own)
        pairs = attachment.activate(chunk.slices)
        with no_reduction():
            model(**batches[dist.get_rank(group)]).loss.backward()
        for piece, gradient in zip(chunk.slices, summed(pairs, weights, 2), strict=True):
            want = piece.of(expected[piece.name])
            worst = max(worst, float((gradient - want).norm() / (want.norm() + 1e-4)))
    with torch.no_grad():
        model(**own)
    return worst, float(sum(records(parameter) for parameter in model.parameters()))


def refusals(group: dist.ProcessGroup) -> dict[str, str]:
    """What ShardedWeights says of models that it cannot take."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = DeviceMesh.from_group(group, "cpu")

    def said(model: nn.Module) -> str:
        try:
            ShardedWeights(model, attach(model).specs)
        except ValueError as error:
            return str(error)
        return "nothing"

    found = {}
    columns = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    placed = fully_shard(columns, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    found["columns"] = said(placed)
    part = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(part[0], mesh=mesh)
    found["part"] = said(part)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(tensor, both["tensor"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
    found["tensor"] = said(fully_shard(tensor, mesh=both["data"]))
    first = FullyShardedDataParallel(
        nn.Linear(4, 4), process_group=group, use_orig_params=True, device_id=torch.device("cpu")
    )
    found["first"] = said(first)
    return found
