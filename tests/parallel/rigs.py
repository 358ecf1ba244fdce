"""One training run, made by one process on the joined batch or by several on a share each, and how the two compare."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from tiny_transformers import FAMILIES, VOCABULARY, build
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import chunkft
from chunkft import ChunkPlan, Slice
from chunkft.plan import parameter_specs

STEPS = 40
ROWS = 12  # of a joined batch: equal shares for two, three and four ranks
BATCHES = 5  # that the steps take in turn
TOLERANCE = 1e-6  # relative, of a loss; models of transformers compute it in fp32 whatever their dtype is
HEAD = {"always_active": "head"}
RANDOM = {"schedule": "random"}
STREAM = {"residency": "stream", "update": "step", "page_bytes": 3000}
BACKWARD = {"residency": "stream", "update": "backward", "page_bytes": 3000}
EXPERTS = {"num_local_experts": 16}  # of which two get a token: some get none on some ranks
ADAMW = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.05}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        family: of tests/tiny_transformers.py.
        world: number of ranks.
        chunks: K.
        clip: greatest norm of the gradient, or None.
        accumulate: backward passes a step.
        options: further keywords of the optimizer.
        changes: of the model's configuration.
        nan: step and rank whose loss is not a number; one process alone meets it in that step, too.
    """

    family: str
    world: int
    chunks: int
    clip: float | None = None
    accumulate: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    steps: int = STEPS
    nan: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [self.family, f"world{self.world}", f"K{self.chunks}"]
        parts += [f"clip{self.clip}"] * (self.clip is not None)
        parts += [f"accumulate{self.accumulate}"] * (self.accumulate > 1)
        parts += [str(value) for value in self.options.values()]
        return "-".join(parts)

    def model(self) -> nn.Module:
        """The model, with the same weights at every call.

        Routers of experts decide clearly: those of a new model give all experts nearly the same, and rounding would
        then send a token to another expert.
        """
        model = build(self.family, **self.changes).to(self.dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    parameter.mul_(40)
        return model

    def spoils(self, step: int, rank: int, world: int) -> bool:
        """Whether a rank's loss is not a number."""
        return self.nan is not None and self.nan[0] == step and (world == 1 or self.nan[1] == rank)

    def keywords(self) -> dict[str, Any]:
        """Those of ``ChunkAdamW`` that one process and many have in common."""
        return {
            **ADAMW,
            "chunks": self.chunks,
            "interval": 2,
            "max_grad_norm": self.clip,
            "seed": 3,
            **self.options,
        }


@dataclass(frozen=True)
class Trained:
    """What one process tells of its run: losses and norms by step, and the weights it ends with.

    Attributes:
        losses: of its own share.
        norms: of the gradient before it was clipped; empty without clipping.
        weights: digest of the bits of all weights.
        updates, skipped, active: of the optimizer.
        plan: of the optimizer, as a dict; None of a dense one.
    """

    losses: list[float]
    norms: list[float]
    weights: str
    updates: int
    skipped: int
    active: int
    plan: dict[str, Any] | None


def train_alone(group: Any, case: Case, plan: dict[str, Any] | None = None) -> Trained:
    """One process on the joined batch, with chunks of its own or those of a plan."""
    model = case.model()
    keywords = case.keywords()
    if plan is not None:  # it says what is always active
        keywords |= {"partition": for_one_process(ChunkPlan.from_dict(plan), model), "always_active": None}
    return _loop(case, model, chunkft.ChunkAdamW(model, **keywords), 0, 1)


def train_replica(group: Any, case: Case) -> Trained:
    """One rank of several, each with all weights."""
    model = case.model()
    optimizer = chunkft.ChunkAdamW(model, process_group=group, **case.keywords())
    return _loop(case, model, optimizer, dist.get_rank(group), group.size())


def train_sharded(group: Any, case: Case) -> Trained:
    """One rank of several, each with a shard of every weight (FSDP2)."""
    model = sharded(case.model(), group)
    optimizer = chunkft.ChunkAdamW(model, **case.keywords())
    return _loop(case, model, optimizer, dist.get_rank(group), group.size())


def train_dense_replica(group: Any, case: Case) -> Trained:
    """``DistributedDataParallel`` and ``torch.optim.AdamW``."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    wrapped = DistributedDataParallel(model, process_group=group)
    return _loop(case, wrapped, optimizer, dist.get_rank(group), group.size())


def train_dense_sharded(group: Any, case: Case) -> Trained:
    """FSDP2 and ``torch.optim.AdamW``."""
    model = sharded(case.model(), group)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    return _loop(case, model, optimizer, dist.get_rank(group), group.size())


def sharded(model: nn.Module, group: Any, **options: Any) -> nn.Module:
    """The model after ``fully_shard`` of each of its blocks and of itself, with options of it."""
    options = {"mesh": DeviceMesh.from_group(group, "cpu")} | options
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def for_one_process(plan: ChunkPlan, model: nn.Module) -> ChunkPlan:
    """A plan of pieces that ranks own, as one process can follow it: the pieces of a chunk joined where they meet.

    Which elements train when stays as it was.
    """
    specs = {spec.name: spec for spec in parameter_specs(model)}

    def joined(pieces: tuple[Slice, ...]) -> tuple[Slice, ...]:
        found: list[Slice] = []
        for piece in sorted(pieces, key=lambda piece: (piece.name, piece.start)):
            last = found[-1] if found else None
            if last is not None and (last.name, last.dim, last.stop) == (piece.name, piece.dim, piece.start):
                found[-1] = replace(last, stop=piece.stop)
            else:
                found.append(piece)
        return tuple(
            specs[piece.name].whole() if piece.numel == specs[piece.name].whole().numel else piece
            for piece in found
        )

    chunks = tuple(replace(chunk, slices=joined(chunk.slices)) for chunk in plan.chunks)
    return ChunkPlan(chunks, joined(plan.always))


def run(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, group: Any) -> Trained:
    """Train a model of one's own making by the steps of a case."""
    return _loop(case, model, optimizer, dist.get_rank(group), group.size())


def batch_of(case: Case, step: int, part: int, rank: int, world: int) -> dict[str, Tensor]:
    """A rank's share of a joined batch: the arguments of a forward pass."""
    generator = torch.Generator().manual_seed(1000 + case.accumulate * (step % BATCHES) + part)
    ids = torch.randint(3, VOCABULARY, (ROWS, 7), generator=generator)
    labels = ids
    if FAMILIES[case.family][3] == "classes":
        labels = torch.randint(0, 3, (ROWS,), generator=generator)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return {"input_ids": ids[rows], "labels": labels[rows]}


def digest(model: nn.Module) -> str:
    """Of the bits of all weights that this process holds."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found.update(local.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def joined_losses(ranks: list[Trained]) -> list[float]:
    """The losses of the joined batch, of which each rank has an equal share."""
    return [math.fsum(values) / len(values) for values in zip(*(rank.losses for rank in ranks), strict=True)]


def assert_same_run(case: Case, ranks: list[Trained], other: list[Trained]) -> None:
    """Losses, norms and counts of several ranks are those of one process, or of other ranks."""
    expected = joined_losses(other)
    assert min(expected[-BATCHES:]) < 0.98 * expected[0], "the run has learned nothing"
    _assert_near("loss", joined_losses(ranks), expected, TOLERANCE)
    for rank in ranks:
        assert rank.norms == ranks[0].norms
        assert rank.active == ranks[0].active
        assert (rank.updates, rank.skipped) == (other[0].updates, other[0].skipped)
    # errors of a gradient add up in its norm, and cancel in the mean of a loss
    _assert_near("norm", ranks[0].norms, other[0].norms, 20 * TOLERANCE)
    if case.clip is not None:
        assert max(ranks[0].norms) > case.clip, "nothing was clipped"


def assert_same_bits(ranks: list[Trained]) -> None:
    """All ranks end with the same weights, bit for bit."""
    assert len({rank.weights for rank in ranks}) == 1, "the weights of the ranks differ"


def _assert_near(what: str, found: list[float], expected: list[float], tolerance: float) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        off = abs(one - other) / abs(other)
        assert off <= tolerance, f"{what} of step {step} is {one!r}, not {other!r}: off by {off:.1e}"


def _loop(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int) -> Trained:
    dense = None if isinstance(optimizer, chunkft.ChunkAdamW) else model
    losses, norms = [], []
    for step in range(case.steps):
        total = 0.0
        for part in range(case.accumulate):
            with _gradients_kept(model, last=part == case.accumulate - 1):
                loss = model(**batch_of(case, step, part, rank, world)).loss / case.accumulate
                total += loss.item()
                (loss * float("nan") if case.spoils(step, rank, world) else loss).backward()
        losses.append(total)
        if dense is not None and case.clip is not None:
            norm = nn.utils.clip_grad_norm_(dense.parameters(), case.clip)
            norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        if dense is not None:
            optimizer.zero_grad()
        elif optimizer.grad_norm is not None:
            norms.append(float(optimizer.grad_norm))
    if dense is not None:
        return Trained(losses, norms, digest(model), case.steps, 0, 0, None)
    counts = optimizer.updates, optimizer.skipped, optimizer.active
    return Trained(losses, norms, digest(model), *counts, optimizer.plan.to_dict())


def _gradients_kept(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Of the dense wrapper: nothing is sent before the last backward pass of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in found:
            for block in module:
                found.update(block.modules())
                yield block
