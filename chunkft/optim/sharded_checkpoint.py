"""Checkpoints that all ranks write together, by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkft.optim.restore import LOADING, Restored, read_state, restore_together
from chunkft.optim.sharded_state import HEADER, from_sharded, read_header, sharded_state, wanted
from chunkft.optim.together import Gather, gathers_of, shared, together
from chunkft.parallel import cpu_channel_of, objects_of
from chunkft.weights.replacing import replacing

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer
    from chunkft.optim.team import Team

SAVING = "saving a sharded checkpoint"
METADATA = ".metadata"  # that DCP writes last


def save_sharded(
    optimizer: ChunkOptimizer, directory: str | os.PathLike[str], asynchronous: bool = False
) -> Future[None] | None:
    """Write the optimizer's state to a directory: each rank writes what it has, in the format of DCP.

    It is written beside ``directory``, and takes its place when all ranks are done: at any moment ``directory`` is the
    old checkpoint or the new one. All ranks that share the state call this; in hybrid sharding one group writes, and
    the others wait. A process that trains by itself writes alone.

    Args:
        optimizer: a ``ChunkOptimizer``.
        directory: on a file system that all ranks share; that of rank 0 counts. Its parents are made.
        asynchronous: return as soon as the state is copied, in host memory, and write while training goes on.
            Checkpoints are written one after the other.

    Returns:
        A future if ``asynchronous``, whose ``result()`` waits for the checkpoint and raises what went wrong, on all
        ranks; else None.

    Raises:
        OSError: if it cannot be written; ``directory`` is as it was before. On all ranks.
        RuntimeError: on all ranks, between ``backward`` and ``step``; or if torch has no gloo, by which ranks agree.
    """
    path = os.path.abspath(directory)
    optimizer._check_idle("save_sharded")
    with optimizer._lock:
        found = sharded_state(optimizer)
    entries = found.entries()
    saver = _saver_of(optimizer)
    if asynchronous:
        copies = {key: tensor.to("cpu", copy=True) for key, tensor in found.tensors.items()}
        return saver.submit(path, {HEADER: found.header, **copies}, found.nbytes)
    saver.write(path, entries, found.nbytes, optimizer._attachment.device)
    return None


def load_sharded(optimizer: ChunkOptimizer, directory: str | os.PathLike[str]) -> None:
    """Continue from a directory that ``save_sharded`` wrote, or ``dcp.save`` with a ``ShardedState`` in it.

    Each rank reads the pieces that it needs; there may be other ranks, another number of chunks or one process. All
    ranks that share the state call this.

    Args:
        optimizer: a ``ChunkOptimizer`` for the same model, base optimizer and master mode.
        directory: the checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or of another model; nothing is changed then. What one rank cannot read, none
            does.
    """

    def read() -> tuple[Restored, str]:
        source = _Directory(directory)
        header = read_header(source.header(), source.where)
        return read_state(optimizer, from_sharded(optimizer, header, source.tensor)), str(header["token"])

    restore_together(optimizer, read)


class ShardedState:
    """The state of an optimizer as an entry of a checkpoint that is saved or loaded by DCP with other things.

    ``dcp.save({"model": ..., "optimizer": ShardedState(optimizer)}, checkpoint_id=directory)`` writes it, and
    ``dcp.load({"model": ..., "optimizer": ShardedState(optimizer, directory)}, checkpoint_id=directory)`` reads it, on
    any number of ranks. DCP asks for tensors to read into before it reads: which ones there are, only the checkpoint
    knows. All ranks take part. ``async_save`` copies the state before it returns.

    Args:
        optimizer: a ``ChunkOptimizer``.
        directory: of the checkpoint that is to be loaded; None to save one.
    """

    def __init__(self, optimizer: ChunkOptimizer, directory: str | os.PathLike[str] | None = None) -> None:
        self._optimizer = optimizer
        self._directory = directory

    def state_dict(self) -> dict[str, Any]:
        """What this rank writes; with ``directory`` empty tensors for what it has to read."""
        optimizer, directory = self._optimizer, self._directory
        if directory is None:
            return optimizer.sharded_state_dict()

        def template() -> dict[str, Any]:
            source = _Directory(directory)
            needed = wanted(optimizer, read_header(source.header(), source.where))
            return {
                HEADER: b"",
                **{key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in needed.items()},
            }

        team = optimizer._team
        return together(gathers_of(team, LOADING), 0 if team is None else team.ranks.rank, template)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what was read.

        Raises:
            ValueError: if it is not all that this rank needs, or of another model; nothing is changed then.
        """
        optimizer = self._optimizer

        def tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            found = state_dict.get(key)
            if not isinstance(found, Tensor):
                raise ValueError(
                    "the checkpoint has state that was not asked for, because only its directory tells what there is; "
                    "load with chunkft.ShardedState(optimizer, directory), or by chunkft.load_sharded"
                )
            return found

        def read() -> tuple[Restored, str]:
            header = read_header(state_dict.get(HEADER), "the checkpoint")
            for key, (shape, dtype) in wanted(optimizer, header).items():
                tensor(key, shape, dtype)
            return read_state(optimizer, from_sharded(optimizer, header, tensor)), str(header["token"])

        restore_together(optimizer, read)


class _Saver:
    """Writes checkpoints one after the other, in a thread of its own with communicators of its own."""

    def __init__(self, team: Team | None) -> None:
        reached = [] if team is None else [team.ranks, *([] if team.copies is None else [team.copies])]
        groups = [cpu_channel_of(ranks.channel) for ranks in reached]
        self._gathers: list[Gather] = [partial(_objects, group) for group in groups]
        self._group = groups[0] if groups else None
        self._rank = 0 if team is None else team.ranks.rank
        self._writes = team is None or team.copies is None or team.copies.rank == 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chunkft-checkpoint")

    def submit(self, directory: str, entries: dict[str, Any], nbytes: int) -> Future[None]:
        """Write a checkpoint once those before are written."""
        return self._thread.submit(self._write, directory, entries, nbytes)

    def write(self, directory: str, entries: dict[str, Any], nbytes: int, device: torch.device) -> None:
        """Write a checkpoint now, after those before: from memory of a device DCP copies on the current stream."""
        self._thread.submit(lambda: None).result()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._write(directory, entries, nbytes)

    def _write(self, directory: str, entries: dict[str, Any], nbytes: int) -> None:
        everyone = partial(together, self._gathers, self._rank)
        leads = self._writes and self._rank == 0
        with contextlib.ExitStack() as stack:
            new = replacing(directory, nbytes, _check_replaceable, lambda old, new: None)
            try:
                stage = shared(self._gathers, everyone(lambda: stack.enter_context(new) if leads else None))
                assert stage is not None
                if self._writes:
                    everyone(partial(_check_visible, stage, directory))
                    everyone(partial(self._save, entries, stage, directory))
                else:
                    everyone(lambda: None)
                    everyone(lambda: None)
            except BaseException as error:
                # What was half written goes; the error stays the one that all ranks raise.
                with contextlib.suppress(Exception):
                    stack.pop_all().__exit__(type(error), error, error.__traceback__)
                raise
            everyone(stack.close)

    def _save(self, entries: dict[str, Any], stage: Path, directory: str) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = FileSystemWriter(stage)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "torch.distributed is disabled"
                )  # one process writes by itself
                save(entries, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            rank, (cause, _) = sorted(error.failures.items())[0]
            told = (
                f"directory={directory!r} cannot be written: rank {rank} had {type(cause).__name__}: {cause}"
            )
            number = cause.errno if isinstance(cause, OSError) and cause.errno is not None else errno.EIO
            raise OSError(number, f"{told}; what was there before is untouched") from error


_savers: weakref.WeakKeyDictionary[Any, _Saver] = weakref.WeakKeyDictionary()


def _saver_of(optimizer: ChunkOptimizer) -> _Saver:
    if optimizer not in _savers:
        _savers[optimizer] = _Saver(optimizer._team)
    return _savers[optimizer]


def _objects(group: Any, value: Any) -> list[Any]:
    return objects_of(group, value, SAVING)


def _check_replaceable(directory: Path) -> None:
    if any(directory.iterdir()) and not (directory / METADATA).is_file():
        raise FileExistsError(
            errno.EEXIST, "it has files, but is no checkpoint of torch.distributed.checkpoint"
        )


def _check_visible(stage: Path, directory: str) -> None:
    if not stage.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"directory={directory!r} cannot be written: a rank does not see what rank 0 made there; needs a file "
            "system that all ranks share",
        )


class _Directory:
    """A checkpoint of DCP, of which single entries are read."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        path = Path(os.path.abspath(directory))
        self.where = f"checkpoint directory={os.fspath(directory)!r}"
        if not (path / METADATA).is_file():
            raise FileNotFoundError(
                f"{self.where} does not exist, or is no checkpoint: it has no file {METADATA!r}"
            )
        self._reader = FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:
            raise ValueError(f"{self.where} is damaged: {METADATA!r} cannot be read ({error})") from error
        keys = [one for one in self._metadata.state_dict_metadata if one.split(".")[-1] == HEADER]
        if len(keys) != 1:
            raise ValueError(
                f"{self.where} has the state of {len(keys)} optimizers of chunkft; needs that of one"
            )
        self._prefix = keys[0][: -len(HEADER)]

    def header(self) -> Any:
        """What was saved as the header."""
        key = self._prefix + HEADER
        return self._read({key: b""})[key]

    def tensor(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor, on the CPU."""
        key = self._prefix + key
        tensor: Tensor = self._read({key: torch.empty(shape, dtype=dtype)})[key]
        return tensor

    def _read(self, entries: dict[str, Any]) -> dict[str, Any]:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        class Planner(DefaultLoadPlanner):
            def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
                self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

        planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(entries, self._metadata, True)
            self._reader.set_up_storage_reader(self._metadata, True)
            plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
            self._reader.read_data(plan, planner).wait()
        except Exception as error:
            raise ValueError(
                f"{self.where} is damaged: {next(iter(entries))!r} cannot be read ({error})"
            ) from error
        return entries
