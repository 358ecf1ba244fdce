"""Checkpoints of optimizer state in one safetensors file, streamed slice by slice."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.gathering import GATHERING, Courier, Part, Stopped, described, known_to_all
from chunkft.optim.restore import Restored, read_state, restore_together
from chunkft.optim.serialize import (
    FORMAT,
    is_elementwise,
    optimizer_header,
    range_entry,
    saved_gradients,
    states_by_parameter,
    states_to_save,
)
from chunkft.optim.state import State
from chunkft.optim.together import gathers_of, together
from chunkft.weights.format import DTYPES, encode_header

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


def save_checkpoint(optimizer: ChunkOptimizer, path: str | os.PathLike[str]) -> None:
    """Write the optimizer's state to a safetensors file without holding a second copy of it.

    The file is written beside ``path``, flushed to disk, then renamed: at any moment ``path`` is the old
    checkpoint or the new one. Of many processes that share the state all call this; rank 0 writes, the others send
    what they have block by block, and all return when the file is in its place.

    Args:
        optimizer: a ``ChunkOptimizer``.
        path: file name; its directory must exist. That of rank 0 counts.

    Raises:
        OSError: if it cannot be written (names the file and its size); ``path`` is as it was before. On all ranks.
        RuntimeError: on all ranks, between ``backward`` and ``step``, when gradients of the ranks are not summed yet.
    """
    path = Path(os.path.abspath(path))  # whoever changes the directory meanwhile does not move the file
    team = optimizer._team
    if team is None:
        states = states_to_save(optimizer, "save_checkpoint")
        _write(path, *_layout(optimizer, states))
        return
    gathers, rank = gathers_of(team, GATHERING), team.ranks.rank
    states = together(gathers, rank, partial(states_to_save, optimizer, "save_checkpoint"))
    if team.copies is not None and team.copies.rank:
        together(gathers, rank, lambda: None)  # others write what this one has as well
        return
    known, own = described(states, rank)
    known = known_to_all(team.ranks, known)
    entries, header = _layout(optimizer, known)
    courier = Courier(team.ranks, team.device, own, [entry.remote for entry in entries])
    if rank:
        together(gathers, rank, courier.serve)
    else:
        together(gathers, rank, partial(_write, path, entries, header, courier))


def _write(path: Path, entries: list[_Entry], header: dict[str, Any], courier: Courier | None = None) -> None:
    """Write a file; of what other ranks have with what the courier brings."""
    size = sum(entry.nbytes for entry in entries)
    # A name of its own: other threads and processes, on other machines too, may write the same checkpoint.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as file:
            _write_header(file, entries, header)
            for entry in entries:
                if courier is not None:
                    courier.begin()
                entry.write(file, courier)
            if courier is not None:
                courier.begin()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Stopped:
        _remove(temporary)  # why is told by the rank that failed
    except OSError as error:
        _remove(temporary)
        if courier is not None:
            courier.abandon()
        message = f"checkpoint path={os.fspath(path)!r} of {size:,} bytes cannot be written: {error.strerror}"
        raise OSError(error.errno, message) from error
    except BaseException:
        _remove(temporary)
        if courier is not None:
            courier.abandon()
        raise
    else:
        _sync_directory(path.parent)


def load_checkpoint(optimizer: ChunkOptimizer, path: str | os.PathLike[str]) -> None:
    """Continue from a file that ``save_checkpoint`` wrote; also with another number of chunks, or of processes.

    State goes from the file into host memory, slice by slice. Of many processes that share the state all call this,
    and each reads what it needs: the file must be there for all of them.

    Args:
        optimizer: a ``ChunkOptimizer`` for the same model, base optimizer and master mode.
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole checkpoint of chunkft, or of another model; nothing is changed then. What one
            rank cannot read, none does.
    """
    path = Path(path)
    where = f"checkpoint path={os.fspath(path)!r}"
    with contextlib.ExitStack() as stack:

        def read() -> tuple[Restored, str]:
            if not path.is_file():
                raise FileNotFoundError(f"{where} does not exist")
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                saved, mark = _read_header(file, where)
                return read_state(optimizer, saved), mark
            except SafetensorError as error:
                raise ValueError(f"{where} is not a whole safetensors file: {error}") from error

        # Paged state is read from the file only when it has its place: while the file is open.
        restore_together(optimizer, read)


def _read_header(file: Any, where: str) -> tuple[dict[str, Any], str]:
    """The saved state, its tensors as lazy slices of the file, and a checksum of what describes it."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{where} has format {metadata.get('format')!r}; allowed is {FORMAT!r}")
    text = metadata.get("header", "")
    if metadata.get("crc32") != _checksum(text):
        raise ValueError(f"{where} is damaged: its header does not have the checksum that was saved with it")
    saved = _decode(json.loads(text), file)
    for name, entry in saved["state"].items():
        entry["tensors"] = {key: file.get_slice(f"state/{name}/{key}") for key in entry["tensors"]}
    return saved, metadata["crc32"]


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


class _Entry:
    """One tensor of the file, made of the pieces of a parameter; what no piece covers is zero."""

    def __init__(
        self,
        key: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        parts: Mapping[Slice | None, Tensor | Part],
    ) -> None:
        self.key = key
        self.dtype = dtype
        self.shape = shape
        self.parts = parts
        self.nbytes = math.prod(shape) * dtype.itemsize

    @property
    def remote(self) -> list[Part]:
        """What a courier brings, in the order in which ``write`` asks for it."""
        return [part for part in self.parts.values() if isinstance(part, Part)]

    def write(self, file: IO[bytes], courier: Courier | None) -> None:
        if any(piece is not None and piece.dim not in (0, None) for piece in self.parts):
            whole = torch.zeros(self.shape, dtype=self.dtype)
            for piece, part in self.parts.items():
                assert piece is not None
                if isinstance(part, Part):
                    assert courier is not None
                    part = courier.tensor(part)
                piece.of(whole).copy_(part)
            _write_tensor(file, whole)
            return
        row_bytes = self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes
        position = 0
        for piece, part in self.parts.items():
            if piece is not None and piece.dim == 0:
                _write_zeros(file, (piece.start - position) * row_bytes)
                position = piece.stop
            if isinstance(part, Tensor):
                _write_tensor(file, part)
            elif courier is not None and part.nbytes:
                for block in courier.blocks(part):
                    _write_tensor(file, block)
        if position:
            _write_zeros(file, (self.shape[0] - position) * row_bytes)


def _layout(optimizer: ChunkOptimizer, states: Mapping[Slice, State]) -> tuple[list[_Entry], dict[str, Any]]:
    entries: list[_Entry] = []
    state: dict[str, Any] = {}
    for name, shape, pieces in states_by_parameter(states):
        keys = list(dict.fromkeys(key for key, _ in _elementwise(pieces)))
        for key in keys:
            parts: dict[Slice | None, Tensor | Part] = {
                piece: values[key]
                for piece, values in pieces.items()
                if is_elementwise(piece, key, values.get(key))
            }
            dtype = next(iter(parts.values())).dtype
            entries.append(_Entry(f"state/{name}/{key}", dtype, shape, parts))
        ranges = [range_entry(piece, values) for piece, values in pieces.items()]
        state[name] = {"shape": list(shape), "tensors": keys, "ranges": ranges}
    gradients = saved_gradients(optimizer) if optimizer._team is None else []
    header = {**optimizer_header(optimizer), "state": state, "gradients": gradients}
    return entries, _encode(header, entries)


def _elementwise(pieces: dict[Slice, State]) -> Iterator[tuple[str, Any]]:
    for piece, values in pieces.items():
        for key, value in values.items():
            if is_elementwise(piece, key, value):
                yield key, value


def _encode(value: Any, entries: list[_Entry]) -> Any:
    """JSON form of a header; tensors become references to entries of their own, 0-d ones are written out."""
    if isinstance(value, Part):
        key = f"value/{len(entries)}"
        entries.append(_Entry(key, value.dtype, value.shape, {None: value}))
        return {"$tensor": key}
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dim() == 0 and value.is_floating_point() and bool(torch.isfinite(value)):
            return {"$scalar": value.item(), "dtype": DTYPES[value.dtype]}
        key = f"value/{len(entries)}"
        entries.append(_Entry(key, value.dtype, tuple(value.shape), {None: value}))
        return {"$tensor": key}
    if isinstance(value, dict):
        return {key: _encode(entry, entries) for key, entry in value.items()}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(entry, entries) for entry in value]}
    if isinstance(value, list):
        return [_encode(entry, entries) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state has a {type(value).__name__}, which a checkpoint cannot hold")


def _decode(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_decode(entry, file) for entry in value]
    if not isinstance(value, dict):
        return value
    if "$scalar" in value:
        dtype = next(dtype for dtype, name in DTYPES.items() if name == value["dtype"])
        return torch.tensor(value["$scalar"], dtype=dtype)
    if "$tensor" in value:
        return file.get_tensor(value["$tensor"])
    if "$tuple" in value:
        return tuple(_decode(entry, file) for entry in value["$tuple"])
    return {key: _decode(entry, file) for key, entry in value.items()}


def _write_header(file: IO[bytes], entries: list[_Entry], header: dict[str, Any]) -> None:
    text = json.dumps(header)
    metadata = {"format": FORMAT, "header": text, "crc32": _checksum(text)}
    file.write(encode_header([(entry.key, entry.dtype, tuple(entry.shape)) for entry in entries], metadata))


def _write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1)
    if data.numel():
        file.write(data.view(torch.uint8).numpy().data)


def _write_zeros(file: IO[bytes], count: int) -> None:
    block = bytes(min(count, 1 << 20))
    while count > 0:
        count -= file.write(block[:count])


def _remove(path: Path) -> None:
    with contextlib.suppress(
        OSError
    ):  # not there, or its directory is none: the error that led here says more
        path.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
