"""Reads weights from safetensors files into memory that is there already, with no copy of them beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chunkft.weights.format import DTYPES, Entry, blocks, byte_view, file_state, in_memory_order, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE = 8 << 20
THREADS = 4
_SHOWN = 5


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a model on disk, of which only the headers have been read.

    Attributes:
        path: what was opened: a directory, or a file.
        entries: the tensors of all files, by name.
    """

    path: Path
    entries: dict[str, Entry]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in host memory of its own; in the file's dtype if none is given."""
        entry = self.entries[name]
        own = entry.dtype
        if own is None:
            raise ValueError(f"{_in(entry)} has dtype {entry.code}; {_ALLOWED_DTYPES}")
        target = torch.empty(entry.shape, dtype=own if dtype is None else dtype)
        self.read_into({name: target})
        return target

    def read_into(self, targets: Mapping[str, Tensor], threads: int | None = None) -> None:
        """Fills tensors whose shapes and dtypes were checked (``check``), several pieces at a time.

        Raises:
            OSError: if a file cannot be read, or was replaced or written to since its header was read; the tensors may
                hold parts of the weights then.
        """
        if threads is None:
            threads = min(THREADS, os.cpu_count() or 1)
        descriptors: dict[Path, int] = {}
        try:
            for name in targets:
                entry = self.entries[name]
                if entry.file not in descriptors:
                    descriptors[entry.file] = _open(entry)
            work = (
                piece
                for name, target in targets.items()
                for piece in _pieces(self.entries[name], target.detach(), descriptors)
            )
            with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
                futures = [pool.submit(piece) for piece in work]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; read piece by piece."""
        a, b = self.entries[first], self.entries[second]
        if (a.code, a.shape) != (b.code, b.shape):
            return False
        with open(_open(a), "rb") as left, open(_open(b), "rb") as right:
            left.seek(a.offset)
            right.seek(b.offset)
            for start in range(0, a.nbytes, PIECE):
                count = min(PIECE, a.nbytes - start)
                if left.read(count) != right.read(count):
                    return False
        return True


def open_weights(path: str | os.PathLike[str]) -> WeightFiles:
    """Open the weights of a model: a directory with ``model.safetensors`` or shards and their index, or one file.

    Args:
        path: the directory, or a ``.safetensors`` file.

    Raises:
        FileNotFoundError: if there is nothing, no weights, or a shard is missing that the index names.
        ValueError: if a file is torn or damaged, the index does not fit the files, or the weights are there as
            ``pytorch_model.bin`` only.
    """
    path = Path(path)
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return weights_of(path, [path / WEIGHTS])
        if (path / INDEX).is_file():
            return _open_index(path)
        if any(path.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{path} has its weights as pytorch_model.bin, which cannot be read in parts; convert them once where "
                "there is memory for it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise FileNotFoundError(f"{path} holds no weights; expected {WEIGHTS} or {INDEX}")
    if not path.exists():
        aside = sorted(path.parent.glob(f".{path.name}.*.replaced")) if path.parent.is_dir() else []
        hint = f"; a save was interrupted, the model that it was to replace is {aside[0]}" if aside else ""
        raise FileNotFoundError(
            f"{path} does not exist; expected a model directory or a safetensors file{hint}"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is a file of another kind; expected a directory or a .safetensors file")
    return weights_of(path, [path])


def weights_of(path: Path, files: Iterable[Path]) -> WeightFiles:
    """The tensors of these files together; ``path`` is what messages call them."""
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise ValueError(
                    f"tensor {name!r} is in {entries[name].file} and in {file}; it may be in one only"
                )
            entries[name] = entry
    return WeightFiles(path, entries)


def _open_index(path: Path) -> WeightFiles:
    index = path / INDEX
    try:
        named = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}") from error
    files = sorted(set(named.values()))
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index} names files that are not there: {_some(absent)}; download them anew"
        )
    found = weights_of(path, [path / file for file in files])
    for name, file in named.items():
        entry = found.entries.get(name)
        if entry is None or entry.file != path / file:
            raise ValueError(
                f"{index} says that {file} holds {name!r}, which it does not; download both anew"
            )
    return found


def read_weights(
    path: str | os.PathLike[str],
    targets: Mapping[str, Tensor],
    *,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
    threads: int | None = None,
) -> None:
    """Fill tensors in place from the safetensors files of a model.

    Bytes of the same dtype are read straight into the tensor; others are converted by way of a few MiB for each
    thread. Everything that the headers tell is checked before the first byte is written.

    Args:
        path: a model directory (``model.safetensors``, or shards and index), or one safetensors file.
        targets: tensors by their names in the files, on any device, of the shapes in the files.
        allow_missing: names of targets that may be absent from the files; those are left as they are.
        allow_unexpected: regular expressions of names in the files that need no target.
        threads: how many read at a time; by default 4, or fewer on a smaller machine.

    Raises:
        FileNotFoundError: if there are no weights, or not all files that the index names.
        ValueError: if a file is damaged, or tensors are missing, unexpected, of another shape, or of a dtype that
            cannot be converted; nothing is written then.
        OSError: if reading fails later on; the tensors hold parts of the weights then.
    """
    files = open_weights(path)
    missing = [name for name in targets if name not in files.entries and name not in allow_missing]
    if missing:
        raise ValueError(
            f"{files.path} lacks {_some(missing)}; its tensors are {_some(sorted(files.entries))}"
        )
    ignored = [re.compile(pattern) for pattern in allow_unexpected]
    unexpected = [
        name
        for name in files.entries
        if name not in targets and not any(pattern.search(name) for pattern in ignored)
    ]
    if unexpected:
        raise ValueError(
            f"{files.path} holds {_some(unexpected)}, for which there is no target; name them in allow_unexpected"
        )
    present = {name: target for name, target in targets.items() if name in files.entries}
    check(files, present)
    files.read_into(present, threads)


def check(files: WeightFiles, targets: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor of the files cannot fill its target; only headers are looked at."""
    for name, target in targets.items():
        entry = files.entries[name]
        shape = tuple(target.shape)
        if entry.shape != shape:
            raise ValueError(
                f"{_in(entry)} has shape {entry.shape}, its target {shape}; both must be the same"
            )
        if target.dtype not in DTYPES or target.layout != torch.strided:
            raise ValueError(
                f"the target of {_in(entry)} is {target.dtype}, {target.layout}; {_ALLOWED_DTYPES}"
            )
        if entry.dtype is None:
            raise ValueError(
                f"{_in(entry)} has dtype {entry.code}; {_ALLOWED_DTYPES}: save the model in one of these first"
            )
        if target.is_meta:
            raise ValueError(f"the target of {_in(entry)} is on the meta device; it must have memory")
        if entry.dtype != target.dtype and entry.dtype.is_floating_point != target.dtype.is_floating_point:
            raise ValueError(
                f"{_in(entry)} has dtype {entry.code}, its target {target.dtype}; allowed are two floating dtypes, or"
                " two others"
            )


def _open(entry: Entry) -> int:
    """A descriptor of the file whose header was read, and of no other that came into its place."""
    descriptor = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
    if file_state(descriptor) != entry.state:
        os.close(descriptor)
        raise OSError(f"{entry.file} was replaced or written to while the model was loaded; load it again")
    return descriptor


def _pieces(entry: Entry, target: Tensor, descriptors: Mapping[Path, int]) -> Iterable[Callable[[], None]]:
    """The reads that fill a tensor."""
    descriptor = descriptors[entry.file]
    if in_memory_order(target) and target.dtype == entry.dtype:
        memory = byte_view(target)
        for start in range(0, entry.nbytes, PIECE):
            part = memory[start : start + PIECE]
            yield lambda part=part, start=start: _fill(descriptor, entry, start, part)  # type: ignore[misc]
        return
    assert entry.dtype is not None
    start = 0
    for index, count in blocks(entry.shape, entry.dtype.itemsize, PIECE):
        yield lambda part=target[index], start=start: _convert(descriptor, entry, start, part)  # type: ignore[misc]
        start += count * entry.dtype.itemsize


def _convert(descriptor: int, entry: Entry, start: int, part: Tensor) -> None:
    staged = torch.empty(part.shape, dtype=entry.dtype)
    _fill(descriptor, entry, start, byte_view(staged))
    part.copy_(staged)


def _fill(descriptor: int, entry: Entry, start: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(descriptor, [memory[done:]], entry.offset + start + done)
        except OSError as error:
            raise OSError(error.errno, f"{_in(entry)} cannot be read: {error.strerror}") from error
        if count == 0:
            raise OSError(f"{_in(entry)} ends too early: the file has become shorter since it was opened")
        done += count


_ALLOWED_DTYPES = f"allowed are {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"


def _in(entry: Entry) -> str:
    return f"tensor {entry.name!r} of {entry.file}"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, list(names)[:_SHOWN]))
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
