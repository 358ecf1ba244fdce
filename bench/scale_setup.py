"""What bench.scale runs in each process: a small model trained by one method, its bytes counted in two ways."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import chunkft

from . import common, plain_llama, scale_model, wire

LR = 1e-3
TIMEOUT = 120  # seconds that a collective may take
BATCH, TOKENS = 8, 24  # sequences of all ranks together, tokens of each
# method: the collectives that carry each kind of bytes
KINDS = {
    "replicas": {"exchange": "gradients", "gather": "weights"},
    "fsdp2": {"exchange": "gradients", "gather": "gathers"},
    "hybrid": {"exchange": "gradients", "sum": "gradients", "gather": "gathers"},
    "ddp": {"sum": "gradients"},
    "zero3": {"scatter": "gradients", "gather": "gathers"},
}


@dataclass(frozen=True)
class Case:
    """One training run; `steps` of it are two sweeps or more, of which the last is counted."""

    method: str
    ranks: int
    chunks: int = 1
    dtype: str = "float32"
    steps: int = 8

    @property
    def name(self) -> str:
        """Of the case."""
        cut = f" K={self.chunks}" if self.method in scale_model.CHUNKED else ""
        return f"{self.method}{cut} {self.dtype} W={self.ranks}"


def shape_of(size: plain_llama.Shape) -> scale_model.Shape:
    """The same sizes for the arithmetic model."""
    kv = size.kv * size.hidden // size.heads
    return scale_model.Shape("measured", size.layers, size.hidden, size.intermediate, kv, size.vocab)


def setting_of(case: Case, size: plain_llama.Shape) -> scale_model.Setting:
    """The arithmetic model's setting of a case."""
    element = getattr(torch, case.dtype).itemsize
    tokens = BATCH * TOKENS // case.ranks
    return scale_model.Setting(
        shape_of(size),
        case.method,
        case.ranks,
        case.chunks,
        tokens,
        element=element,
        shard=max(1, case.ranks // 2),
    )


def build(size: plain_llama.Shape, dtype: str, seed: int = 0) -> plain_llama.PlainLlama:
    """A model with random weights drawn from `seed` in fp32."""
    torch.manual_seed(seed)
    model = plain_llama.PlainLlama(size)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    return model.to(getattr(torch, dtype)).train()


def batch(size: plain_llama.Shape, step: int) -> Tensor:
    """Token ids (BATCH, TOKENS + 1) of all ranks together."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, size.vocab, (BATCH, TOKENS + 1), generator=generator)


def prepared(case: Case, model: nn.Module, counted: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as its method wants it, and the optimizer; ``counted`` costs `DistributedDataParallel` time."""
    if case.method in scale_model.SHARDED:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        hybrid = case.method == "hybrid"
        sizes = (2, case.ranks // 2) if hybrid else (case.ranks,)
        names = ("copies", "shards") if hybrid else ("shards",)
        mesh = init_device_mesh(device_of(model).type, sizes, mesh_dim_names=names)
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if case.method in scale_model.CHUNKED:
        group = "default" if case.method == "replicas" else None
        options: dict[str, Any] = {"chunks": case.chunks, "interval": 1, "process_group": group}
        return model, chunkft.ChunkAdamW(model, lr=LR, **options)
    if case.method == "ddp":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        wrapped = nn.parallel.DistributedDataParallel(model)
        if counted:  # its collectives pass through Python
            wrapped.register_comm_hook(None, allreduce_hook)
        model = wrapped
    fused = device_of(model).type == "cuda"
    return model, torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def train(case: Case, size: plain_llama.Shape, sent: wire.Wire) -> dict[str, Any]:
    """Losses of this rank, and bytes of its last sweep and of its state."""
    model, optimizer = prepared(case, build(size, case.dtype))
    rank, share = dist.get_rank(), BATCH // case.ranks
    sweep = case.chunks if case.method in scale_model.CHUNKED else 1
    losses, said = [], dict[str, int]()
    for step in range(case.steps):
        if step == case.steps - sweep:
            sent.taken()
            _traffic(optimizer)
        loss = model(batch(size, step)[rank * share : (rank + 1) * share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    said = _traffic(optimizer)
    found: dict[str, Any] = {
        "losses": losses,
        "wire": {kind: bytes_ / sweep for kind, bytes_ in sent.taken().items()},
        "said": {kind: bytes_ / sweep for kind, bytes_ in said.items()},
    }
    if isinstance(optimizer, chunkft.ChunkOptimizer):
        found["memory"] = optimizer.memory()
        found["plan"] = optimizer.plan.to_dict()
        optimizer.detach()
    else:
        kept = (each for state in optimizer.state.values() for each in state.values() if each.dim())
        local = (each.to_local() if hasattr(each, "to_local") else each for each in kept)
        found["memory"] = {"state_active": sum(each.numel() * each.element_size() for each in local)}
    return found


def _traffic(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return dict(optimizer.traffic()) if isinstance(optimizer, chunkft.ChunkOptimizer) else {}


def worker(rank: int, port: int, ranks: int, cases: list[Case], size: plain_llama.Shape, folder: str) -> None:
    """All cases of one number of ranks in this process; writes RANK.json."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        found = []
        for case in cases:
            with wire.counted() as sent:
                found.append({"case": asdict(case), **train(case, size, sent)})
        common.write_json(Path(folder) / f"{rank}.json", {"cases": found})
    finally:
        dist.destroy_process_group()


def whole_vectors(plan: dict[str, Any]) -> chunkft.ChunkPlan:
    """A plan for one process: vectors, which shards cut among ranks, are in one piece again."""
    chunks = []
    for pieces in plan["chunks"]:
        vectors = {
            name: [name, None, 0, *shape, shape, size]
            for name, _, _, _, shape, size in pieces
            if len(shape) == 1
        }
        chunks.append([piece for piece in pieces if len(piece[4]) > 1] + list(vectors.values()))
    return chunkft.ChunkPlan.from_dict(plan | {"chunks": chunks})


def alone(case: Case, size: plain_llama.Shape, plan: dict[str, Any] | None) -> list[float]:
    """Losses of one process on the joined batches, with the same plan, or full AdamW where there is none."""
    model = build(size, case.dtype)
    optimizer: torch.optim.Optimizer
    if plan is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    else:
        cut = whole_vectors(plan)
        optimizer = chunkft.ChunkAdamW(model, lr=LR, chunks=None, partition=cut, interval=1)
    losses = []
    for step in range(case.steps):
        loss = model(batch(size, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
