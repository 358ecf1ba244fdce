"""Writes weights as transformers does, straight from the memory where they live, into a directory that is whole at any
moment.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chunkft.weights.format import DTYPES, blocks, byte_view, encode_header, in_memory_order
from chunkft.weights.reading import INDEX, WEIGHTS
from chunkft.weights.replacing import replacing

SHARD_BYTES = 5_000_000_000
PIECE = 16 << 20
# What lies in a model directory. The first kind is replaced; each other kind is taken over from the old model, unless
# the new one brings files of that kind itself.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_CONFIG = re.compile(r"(generation_)?config\.json|(configuration|modeling)_\w+\.py")
_TOKENIZER = re.compile(
    r"(special_tokens_map|added_tokens|vocab.*|tokenizer.*|normalizer|emoji|(pre)?processor_config|(image_|video_|feature_)?"
    r"preprocessor_config|processor_config)\.json|(merges|vocab|bpe).*\.(txt|codes)|.*\.(model|spm|tiktoken|jinja)"
    r"|additional_chat_templates|(tokenization|processing|image_processing)_\w+\.py"
)
_TEXTS = re.compile(r"README\.md|(LICENSE|NOTICE|USE_POLICY).*|\.gitattributes", re.IGNORECASE)


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written, and let go of then.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        make: gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_weights(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Deferred],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write tensors as ``model.safetensors``, or as shards and an index, in place of the model in ``directory``.

    The directory is written beside the old one, flushed to disk, and exchanged with it: killed at any moment, the path
    holds the old model or the new one, whole. Tensors in host memory go into the file as they lie there; those on a
    device, or strided, pass through a few MiB.

    Args:
        directory: of the model; made with its parents if it is not there. Its config, tokenizer and texts stay unless
            ``extra`` writes others.
        tensors: by name, in any order; each is written, also where two share memory. They must not change meanwhile.
        max_shard_bytes: most bytes of weights in a file; a larger tensor has a file of its own.
        extra: writes further files into the directory that it is given.

    Raises:
        ValueError: if ``directory`` holds files that are no part of a model, or is the current directory; if there are
            no tensors; if ``max_shard_bytes`` is below 1.
        TypeError: if a tensor cannot be written: on the meta device, sparse, or of another dtype.
        OSError: if the directory cannot be written (a file in its place, a full disk, ...); the old model is as it was.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: allowed is a number of bytes from 1 on")
    if not tensors:
        raise ValueError("tensors is empty; expected the weights of a model")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    shards = _shards(tensors, max_shard_bytes)
    total = sum(map(_nbytes, tensors.values()))
    with replacing(directory, total, _check_directory, _carry) as stage:
        if extra is not None:
            extra(stage)
        for file, names in shards.items():
            _write_shard(stage / file, {name: tensors[name] for name in names})
        if len(shards) > 1:
            count = sum(math.prod(tensor.shape) for tensor in tensors.values())
            index = {
                "metadata": {"total_parameters": count, "total_size": total},
                "weight_map": {name: file for file, names in shards.items() for name in names},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            with _new_file(stage / INDEX) as descriptor:
                _write(descriptor, memoryview(text.encode()))


def _check_tensor(name: str, tensor: Tensor | Deferred) -> None:
    if not isinstance(tensor, Tensor | Deferred):
        raise TypeError(f"tensors[{name!r}] is a {type(tensor).__name__}; allowed is a tensor")
    if isinstance(tensor, Tensor):
        if tensor.is_meta:
            raise TypeError(f"tensors[{name!r}] is on the meta device and has no values to be written")
        if tensor.layout != torch.strided:
            raise TypeError(f"tensors[{name!r}] has layout {tensor.layout}; allowed is torch.strided")
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"tensors[{name!r}] has dtype {tensor.dtype}; allowed are {allowed}")


def _nbytes(tensor: Tensor | Deferred) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _shards(tensors: Mapping[str, Tensor | Deferred], limit: int) -> dict[str, list[str]]:
    """Names of the tensors of each file, by file name."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _nbytes(tensor)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05}-of-{len(groups):05}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _write_shard(path: Path, tensors: Mapping[str, Tensor | Deferred]) -> None:
    # Wide dtypes first, so that each tensor starts on a multiple of its item size, as maps of the file want it.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered]
    with _new_file(path) as descriptor:
        _write(descriptor, memoryview(encode_header(header, {"format": "pt"})))
        for name, tensor in ordered:
            made = tensor if isinstance(tensor, Tensor) else tensor.make()
            if (tuple(made.shape), made.dtype) != (tuple(tensor.shape), tensor.dtype):
                raise RuntimeError(
                    f"tensors[{name!r}] became {made.dtype} {tuple(made.shape)} while being saved"
                )
            for part in _parts(made.detach()):
                _write(descriptor, part)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that was not there, flushed to disk at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of the file, a piece at a time."""
    if in_memory_order(tensor):
        memory = byte_view(tensor)
        for start in range(0, len(memory), PIECE):
            yield memory[start : start + PIECE]
        return
    for index, _ in blocks(tuple(tensor.shape), tensor.dtype.itemsize, PIECE):
        yield byte_view(tensor[index].cpu().contiguous())


def _write(descriptor: int, memory: memoryview) -> None:
    while memory:
        memory = memory[os.write(descriptor, memory) :]


def _check_directory(path: Path) -> None:
    """Raises ValueError if the directory holds what would be lost with it."""
    names = sorted(entry.name for entry in path.iterdir())
    kinds = (_WEIGHTS, _CONFIG, _TOKENIZER, _TEXTS)
    foreign = [name for name in names if not any(kind.fullmatch(name) for kind in kinds)]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"directory={os.fspath(path)!r} holds {', '.join(map(repr, foreign[:3]))}{more}, no part of a model, and is"
            " replaced as a whole; allowed is a new or empty directory, or one with a model alone"
        )


def _carry(old: Path, new: Path) -> None:
    """Takes over what the old model has beside its weights and the new one does not bring."""
    brought = [entry.name for entry in new.iterdir()]
    for kind in (_CONFIG, _TOKENIZER, _TEXTS):
        if any(kind.fullmatch(name) for name in brought):
            continue
        for entry in old.iterdir():
            if not kind.fullmatch(entry.name):
                continue
            if entry.is_dir():
                shutil.copytree(entry, new / entry.name)
            else:
                shutil.copy2(entry, new / entry.name)
