"""Checkpoints of optimizer state in one safetensors file, streamed slice by slice."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.restore import read_state, restore
from chunkft.optim.serialize import (
    FORMAT,
    is_elementwise,
    optimizer_header,
    range_entry,
    saved_gradients,
    states_by_parameter,
)
from chunkft.optim.state import State
from chunkft.optim.switch import settle
from chunkft.weights.format import DTYPES, encode_header

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


def save_checkpoint(optimizer: ChunkOptimizer, path: str | os.PathLike[str]) -> None:
    """Write the optimizer's state to a safetensors file without holding a second copy of it.

    The file is written beside ``path``, flushed to disk, then renamed: at any moment ``path`` is the old
    checkpoint or the new one.

    Args:
        optimizer: a ``ChunkOptimizer``.
        path: file name; its directory must exist.

    Raises:
        OSError: if it cannot be written (names the file and its size); ``path`` is as it was before.
    """
    optimizer._check_attached("save_checkpoint")
    settle(optimizer)
    optimizer._check_between_steps("save_checkpoint")
    path = Path(os.path.abspath(path))  # whoever changes the directory meanwhile does not move the file
    entries, header = _layout(optimizer)
    size = sum(entry.nbytes for entry in entries)
    # A name of its own: other threads and processes, on other machines too, may write the same checkpoint.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as file:
            _write_header(file, entries, header)
            for entry in entries:
                entry.write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        message = f"checkpoint path={os.fspath(path)!r} of {size:,} bytes cannot be written: {error.strerror}"
        raise OSError(error.errno, message) from error
    except BaseException:
        _remove(temporary)
        raise
    _sync_directory(path.parent)


def load_checkpoint(optimizer: ChunkOptimizer, path: str | os.PathLike[str]) -> None:
    """Continue from a file that ``save_checkpoint`` wrote; also with another number of chunks.

    State goes from the file into host memory, slice by slice.

    Args:
        optimizer: a ``ChunkOptimizer`` for the same model, base optimizer and master mode.
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole checkpoint of chunkft, or of another model; nothing is changed then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint path={os.fspath(path)!r} does not exist")
    where = f"checkpoint path={os.fspath(path)!r}"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Paged state is read from the file only when it has its place: inside of `with`.
            restore(optimizer, read_state(optimizer, _read_header(file, where)))
    except SafetensorError as error:
        raise ValueError(f"{where} is not a whole safetensors file: {error}") from error


def _read_header(file: Any, where: str) -> dict[str, Any]:
    """The saved state, its tensors as lazy slices of the file."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{where} has format {metadata.get('format')!r}; allowed is {FORMAT!r}")
    text = metadata.get("header", "")
    if metadata.get("crc32") != _checksum(text):
        raise ValueError(f"{where} is damaged: its header does not have the checksum that was saved with it")
    saved = _decode(json.loads(text), file)
    for name, entry in saved["state"].items():
        entry["tensors"] = {key: file.get_slice(f"state/{name}/{key}") for key in entry["tensors"]}
    return saved  # type: ignore[no-any-return]


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


class _Entry:
    """One tensor of the file, made of the pieces of a parameter; what no piece covers is zero."""

    def __init__(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], parts: dict[Slice | None, Tensor]
    ) -> None:
        self.key = key
        self.dtype = dtype
        self.shape = shape
        self.parts = parts
        self.nbytes = math.prod(shape) * dtype.itemsize

    def write(self, file: IO[bytes]) -> None:
        if any(piece is not None and piece.dim not in (0, None) for piece in self.parts):
            whole = torch.zeros(self.shape, dtype=self.dtype)
            for piece, tensor in self.parts.items():
                assert piece is not None
                piece.of(whole).copy_(tensor)
            _write_tensor(file, whole)
            return
        row_bytes = self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes
        position = 0
        for piece, tensor in self.parts.items():
            if piece is not None and piece.dim == 0:
                _write_zeros(file, (piece.start - position) * row_bytes)
                position = piece.stop
            _write_tensor(file, tensor)
        if position:
            _write_zeros(file, (self.shape[0] - position) * row_bytes)


def _layout(optimizer: ChunkOptimizer) -> tuple[list[_Entry], dict[str, Any]]:
    entries: list[_Entry] = []
    state: dict[str, Any] = {}
    for name, shape, pieces in states_by_parameter(optimizer):
        keys = list(dict.fromkeys(key for key, _ in _elementwise(pieces)))
        for key in keys:
            parts: dict[Slice | None, Tensor] = {
                piece: values[key]
                for piece, values in pieces.items()
                if is_elementwise(piece, key, values.get(key))
            }
            dtype = next(iter(parts.values())).dtype
            entries.append(_Entry(f"state/{name}/{key}", dtype, shape, parts))
        ranges = [range_entry(piece, values) for piece, values in pieces.items()]
        state[name] = {"shape": list(shape), "tensors": keys, "ranges": ranges}
    header = {**optimizer_header(optimizer), "state": state, "gradients": saved_gradients(optimizer)}
    return entries, _encode(header, entries)


def _elementwise(pieces: dict[Slice, State]) -> Iterator[tuple[str, Tensor]]:
    for piece, values in pieces.items():
        for key, value in values.items():
            if is_elementwise(piece, key, value):
                yield key, value


def _encode(value: Any, entries: list[_Entry]) -> Any:
    """JSON form of a header; tensors become references to entries of their own, 0-d ones are written out."""
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
