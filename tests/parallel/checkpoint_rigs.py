"""What one rank does in the tests of checkpoints: a run that is saved in all ways, and its continuation."""

from __future__ import annotations

import errno
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rigs import Case, batch_of, digest, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import chunkft
from chunkft.optim import checkpoint as checkpoint_module
from chunkft.optim import gathering
from chunkft.optim.gathering import Courier

WAYS = ("file", "directory", "later", "part", "merged", "with model")


@dataclass
class Run:
    """Losses of the steps of one rank, and what it ends with.

    Attributes:
        weights: digest of its weights.
        whole: the ``full_state_dict`` at the time of saving or loading, on rank 0.
        position: interval, position in it and active chunk after loading.
        kept: elements of state that this rank holds.
    """

    losses: list[float]
    weights: str
    whole: dict[str, Any] | None
    position: tuple[int, int, int]
    kept: int


def start(group: Any, case: Case, kind: str, weights: Any = None) -> tuple[nn.Module, Any, int, int]:
    """A model, as it was saved or new, and its optimizer, in one process (``alone``) or many."""
    model = case.model()
    if weights is not None:
        model.load_state_dict(weights)
    if kind == "alone":
        return model, chunkft.ChunkAdamW(model, **case.keywords()), 0, 1
    rank, world = dist.get_rank(group), group.size()
    if kind == "replicas":
        return model, chunkft.ChunkAdamW(model, process_group=group, **case.keywords()), rank, world
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
        fully_shard(model, mesh=mesh)
    else:
        model = sharded(model, group)
    return model, chunkft.ChunkAdamW(model, **case.keywords()), rank, world


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in model.state_dict().items()
    }


def take(case: Case, model: nn.Module, optimizer: Any, rank: int, world: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        for part in range(case.accumulate):
            loss = model(**batch_of(case, step, part, rank, world)).loss / case.accumulate
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def run(group: Any, case: Case, kind: str, folder: Path, before: int, after: int) -> Run:
    """Train, save in all ways, and go on."""
    model, optimizer, rank, world = start(group, case, kind)
    take(case, model, optimizer, rank, world, range(before))
    weights = whole_weights(model)
    later = chunkft.save_sharded(optimizer, folder / "later", asynchronous=True)
    chunkft.save_checkpoint(optimizer, folder / "file")
    chunkft.save_sharded(optimizer, folder / "directory")
    own = {"model": model.state_dict(), "optimizer": chunkft.ShardedState(optimizer)}
    dcp.save(own, checkpoint_id=folder / "with model", process_group=group)
    torch.save(optimizer.state_dict(), folder / f"part-{rank}")
    if rank == 0:
        torch.save(weights, folder / "weights")
    whole = optimizer.full_state_dict()
    assert (whole is None) == (rank > 0)
    everywhere = optimizer.full_state_dict(everywhere=True)
    assert everywhere is not None
    result = told(model, optimizer, take(case, model, optimizer, rank, world, range(before, before + after)))
    later.result(30)
    result.whole = whole
    return result


def told(model: nn.Module, optimizer: Any, losses: list[float]) -> Run:
    kept = sum(
        tensor.numel()
        for state in optimizer._slice_states().values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    )
    position = optimizer._interval_index, optimizer.interval_position, optimizer.active
    return Run(losses, digest(model), None, position, kept)


def load(optimizer: Any, folder: Path, way: str, group: Any, model: nn.Module, saved_by: int) -> None:
    """Continue from what ``run`` saved."""
    if way == "file":
        chunkft.load_checkpoint(optimizer, folder / "file")
    elif way in ("directory", "later"):
        chunkft.load_sharded(optimizer, folder / way)
    elif way == "part":
        part = torch.load(folder / f"part-{dist.get_rank(group)}", weights_only=True)
        optimizer.load_state_dict(part)
    elif way == "merged":
        parts = [torch.load(folder / f"part-{rank}", weights_only=True) for rank in reversed(range(saved_by))]
        optimizer.load_state_dict(chunkft.merge_states(parts))
    else:
        own = {"model": model.state_dict(), "optimizer": chunkft.ShardedState(optimizer, folder / way)}
        dcp.load(own, checkpoint_id=folder / way, process_group=group)


def resume(
    group: Any,
    case: Case,
    kind: str,
    folder: Path,
    ways: tuple[str, ...],
    before: int,
    after: int,
    saved_by: int,
) -> dict[str, Run]:
    """Go on from each of the ways in which a run was saved."""
    weights = torch.load(folder / "weights", weights_only=True)
    found = {}
    for way in ways:
        model, optimizer, rank, world = start(group, case, kind, weights)
        load(optimizer, folder, way, group, model, saved_by)
        whole = optimizer.full_state_dict()
        position = optimizer._interval_index, optimizer.interval_position, optimizer.active
        losses = take(case, model, optimizer, rank, world, range(before, before + after))
        found[way] = replace(told(model, optimizer, losses), whole=whole, position=position)
        optimizer.detach()
    return found


def rows(whole: dict[str, Any]) -> dict[tuple[str, str], Tensor]:
    """Moments of all elements, and the step count of every row, by name of the parameter."""
    found = {}
    for name, entry in whole["state"].items():
        shape = entry["shape"]
        for key, tensor in entry["tensors"].items():
            found[name, key] = tensor
        counts = torch.zeros(shape)
        for one in entry["ranges"]:
            part = (
                counts
                if one["dim"] is None
                else counts.narrow(one["dim"], one["start"], one["stop"] - one["start"])
            )
            part.fill_(float(one["values"]["step"]))
        found[name, "step"] = counts
    return found


def joined_losses(ranks: list[Run]) -> list[float]:
    return [math.fsum(values) / len(values) for values in zip(*(rank.losses for rank in ranks), strict=True)]


# --- what goes wrong


class FullDisk:
    """A file whose n-th write fails."""

    def __init__(self, file: Any, limit: int) -> None:
        self.file, self.left = file, limit

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def error_of(action: Any, *args: Any) -> tuple[str, str]:
    try:
        action(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def fill_disk(group: Any, case: Case, kind: str, folder: Path, blocks: int) -> list[tuple[str, str]]:
    """Errors of attempts to save, with room for more and more writes, until one succeeds; it was tried on rank 0."""
    gathering.BLOCK_BYTES = blocks
    model, optimizer, rank, world = start(group, case, kind)
    take(case, model, optimizer, rank, world, range(5))
    path = folder / "file"
    chunkft.save_checkpoint(optimizer, path)
    old = path.read_bytes()
    errors = []
    limit = 0
    try:
        while not errors or errors[-1][0] != "nothing":

            def opened(name: Any, mode: str, room: int = limit) -> FullDisk:
                return FullDisk(Path(name).open(mode), room)

            checkpoint_module.open = opened
            errors.append(error_of(chunkft.save_checkpoint, optimizer, path))
            dist.barrier(group)
            assert path.read_bytes() == old
            assert sorted(os.listdir(folder)) == ["file"]
            dist.barrier(group)
            limit += 1 + limit // 3
    finally:
        del checkpoint_module.open
        gathering.BLOCK_BYTES = 32 << 20
    take(case, model, optimizer, rank, world, range(5, 7))
    return errors


def lose_state(group: Any, case: Case, folder: Path) -> list[tuple[str, str]]:
    """Errors of a checkpoint, and of gathering for one and for all, for which rank 1 cannot read what it has."""
    model, optimizer, rank, world = start(group, case, "replicas")
    take(case, model, optimizer, rank, world, range(5))
    flat = Courier._flat
    calls = []

    def broken(self: Courier, part: Any) -> Tensor:
        calls.append(part)
        if rank == 1 and len(calls) == 3:
            raise MemoryError("no page can be read")
        return flat(self, part)

    errors = []
    try:
        Courier._flat = broken
        errors.append(error_of(chunkft.save_checkpoint, optimizer, folder / "file"))
        calls.clear()
        errors.append(error_of(optimizer.full_state_dict))
        calls.clear()
        errors.append(error_of(optimizer.full_state_dict, True))
    finally:
        Courier._flat = flat
    assert os.listdir(folder) == []
    take(case, model, optimizer, rank, world, range(5, 7))
    return errors


def refusals(group: Any, case: Case, folder: Path) -> dict[str, tuple[str, str]]:
    """What ranks are told when something does not fit on one of them, and that they train on."""
    model, optimizer, rank, world = start(group, case, "replicas")
    take(case, model, optimizer, rank, world, range(5))
    found = {}
    loss = model(**batch_of(case, 5, 0, rank, world)).loss
    loss.backward()
    found["gradients"] = error_of(chunkft.save_checkpoint, optimizer, folder / "file")
    found["gradients in parts"] = error_of(optimizer.state_dict)
    found["gradients in a directory"] = error_of(chunkft.save_sharded, optimizer, folder / "directory")
    optimizer.step()
    whole, weights = optimizer.full_state_dict(True), digest(model)
    chunkft.save_checkpoint(optimizer, folder / "file")
    chunkft.save_sharded(optimizer, folder / "directory")
    part = optimizer.state_dict()
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, part, group=group)
    found["other part"] = error_of(optimizer.load_state_dict, parts[(rank + 1) % world])
    absent = folder / ("file" if rank != 1 else "absent")
    found["absent"] = error_of(chunkft.load_checkpoint, optimizer, absent)
    if rank == 1:
        (folder / "broken").write_bytes((folder / "file").read_bytes()[:-1])
    dist.barrier(group)
    found["broken"] = error_of(
        chunkft.load_checkpoint, optimizer, folder / ("file" if rank != 1 else "broken")
    )
    found["no checkpoint"] = error_of(chunkft.load_sharded, optimizer, folder)
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "mine").touch()
    dist.barrier(group)
    found["files"] = error_of(chunkft.save_sharded, optimizer, folder / "other")
    _, fresh, *_ = start(group, case, "replicas")
    asked = {"optimizer": chunkft.ShardedState(optimizer)}
    dcp.save(asked, checkpoint_id=folder / "both", process_group=group)
    asked = {"optimizer": chunkft.ShardedState(fresh)}
    found["no directory"] = error_of(
        lambda: dcp.load(asked, checkpoint_id=folder / "both", process_group=group)
    )
    fresh.detach()
    found["missing parts"] = error_of(chunkft.merge_states, parts[1:])
    mixed = [*parts[:1], {**parts[1], "cursor": {**parts[1]["cursor"], "updates": 3}}, *parts[2:]]
    found["mixed parts"] = error_of(chunkft.merge_states, mixed)
    assert all(
        torch.equal(one, rows(whole)[key]) for key, one in rows(optimizer.full_state_dict(True)).items()
    )
    assert digest(model) == weights
    # another file on one rank: what it holds is not what the others go on from
    take(case, model, optimizer, rank, world, range(6, 8))
    chunkft.save_checkpoint(optimizer, folder / "newer")
    found["different"] = error_of(
        chunkft.load_checkpoint, optimizer, folder / ("file" if rank != 1 else "newer")
    )
    take(case, model, optimizer, rank, world, range(8, 10))
    return found


def die_in(group: Any, case: Case, folder: Path, where: str) -> tuple[str, str]:
    """One rank is killed while a checkpoint is saved; what the others are told."""
    model, optimizer, rank, world = start(group, case, "replicas")
    take(case, model, optimizer, rank, world, range(5))
    save = chunkft.save_checkpoint if "file" in where else chunkft.save_sharded
    path = folder / ("file" if "file" in where else "directory")
    save(optimizer, path)
    (folder / "weights").exists() or (rank == 0 and torch.save(whole_weights(model), folder / "weights"))
    dist.barrier(group)
    victim = 0 if where.startswith("rank 0") else 1
    if rank == victim:

        def die(*args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if "file" in where:
            os.fsync = die
            Courier._send = die
        else:
            from torch.distributed.checkpoint.filesystem import FileSystemWriter

            FileSystemWriter.finish = die
            if victim:
                FileSystemWriter.write_data = die
    return error_of(save, optimizer, path)
