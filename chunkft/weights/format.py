"""The safetensors format: 8 bytes of length, a JSON header with byte offsets, then the tensors without gaps.

Source: https://github.com/huggingface/safetensors#format. Read and written here byte by byte, so that tensors go
straight between files and the memory where they live.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
MOST_HEADER_BYTES = 100_000_000  # as the safetensors package has it


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        file: where it is.
        name: of the tensor.
        code: its dtype as the file names it.
        shape: of the tensor.
        offset: of its first byte in the file.
        nbytes: its size.
        state: of the file when its header was read (``file_state``).
    """

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    state: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; None for one that weights cannot be trained in, such as 8-bit floats."""
        return _BY_NAME.get(self.code)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a whole safetensors file: its length is compared with what the header says.
    """
    with open(path, "rb") as file:
        state = file_state(file.fileno())
        size = state[0]
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise _damaged(path, f"of its {size:,} bytes none are a header")
        text = file.read(length)
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        entries = {name: _entry(path, name, value, 8 + length, state) for name, value in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        expected = math.prod(entry.shape) * entry.dtype.itemsize if entry.dtype else entry.nbytes
        if entry.offset != end or entry.nbytes != expected:
            raise _damaged(path, f"tensor {entry.name!r} is not where its shape and dtype put it")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"it has {size:,} bytes, its header promises {end:,}")
    return entries


def file_state(descriptor: int) -> tuple[int, ...]:
    """Size, identity and age of a file: they differ once it was replaced or written to."""
    found = os.fstat(descriptor)
    return (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns)


def _entry(path: Path, name: str, value: Any, base: int, state: tuple[int, ...]) -> Entry:
    start, stop = map(int, value["data_offsets"])
    shape = tuple(map(int, value["shape"]))
    if min((*shape, start, stop - start)) < 0:
        raise ValueError(f"tensor {name!r} has a negative size")
    return Entry(path, name, str(value["dtype"]), shape, base + start, stop - start, state)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a whole safetensors file: {why}; copy or download it anew")


def encode_header(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The bytes that go before the data of ``tensors`` (name, dtype, shape), which follows in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, which are not copied."""
    flat: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return flat


def in_memory_order(tensor: Tensor) -> bool:
    """Whether the bytes of ``tensor`` are those that a file would have."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def blocks(
    shape: tuple[int, ...], itemsize: int, limit: int
) -> Iterator[tuple[tuple[int | slice, ...], int]]:
    """Cuts a tensor into parts of at most ``limit`` bytes that follow each other in a file.

    Yields (index, elements): ``tensor[index]`` is a part of that many elements.
    """
    if math.prod(shape) == 0:
        return
    if not shape or math.prod(shape) * itemsize <= limit:
        yield (), math.prod(shape)
        return
    row = math.prod(shape[1:])
    if row * itemsize > limit:
        for index in range(shape[0]):
            for rest, count in blocks(shape[1:], itemsize, limit):
                yield (index, *rest), count
        return
    rows = max(1, limit // (row * itemsize))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield (slice(start, stop),), (stop - start) * row
