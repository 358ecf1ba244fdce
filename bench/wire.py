"""Counts the bytes of collectives where torch hands them to a process group, whoever asked for them.

It is independent of what chunkft says of itself: methods of torch's ProcessGroup are replaced while it counts, so that
FSDP2's collectives and other people's are seen too. DistributedDataParallel's own are not, as they stay in C++: give it
a communication hook from Python.

A rank is taken to send (W-1)/W of what it scatters, all but its own part of what it exchanges, (W-1) times what others
gather from it, and twice (W-1)/W of what it all-reduces, as around a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 4096  # bytes; below it a sum or a gather is taken for control


def nbytes(tensors: Any) -> int:
    """Bytes of tensors in lists of any depth."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(nbytes(each) for each in tensors)


def _exchanged(group: Any, output: Any, source: Any, *rest: Any) -> int:
    sizes = rest[1] if len(rest) > 1 else None
    if isinstance(source, Tensor) and sizes:
        row = nbytes(source) // max(1, source.shape[0])
        return nbytes(source) - row * sizes[group.rank()]
    if isinstance(source, Tensor):
        return nbytes(source) * (group.size() - 1) // group.size()
    return nbytes(source) - nbytes(source[group.rank()])


def _gathered(group: Any, output: Any, source: Any, *rest: Any) -> int:
    return nbytes(source) * (group.size() - 1)


def _scattered(group: Any, output: Any, source: Any, *rest: Any) -> int:
    return nbytes(source) * (group.size() - 1) // group.size()


def _reduced(group: Any, tensors: Any, *rest: Any) -> int:
    return 2 * nbytes(tensors) * (group.size() - 1) // group.size()


def _sent(group: Any, tensors: Any, *rest: Any) -> int:
    return nbytes(tensors)


def _broadcast(group: Any, tensors: Any, options: Any = None, *rest: Any) -> int:
    root = getattr(options, "rootRank", 0)
    return nbytes(tensors) * (group.size() - 1) if group.rank() == root else 0


# name of the method: what the collective is, and the bytes that it makes a rank send
METHODS: dict[str, tuple[str, Callable[..., int]]] = {
    "all_to_all_single": ("exchange", _exchanged),
    "alltoall_base": ("exchange", _exchanged),
    "alltoall": ("exchange", _exchanged),
    "all_gather_single": ("gather", _gathered),
    "_allgather_base": ("gather", _gathered),
    "allgather": ("gather", _gathered),
    "reduce_scatter_single": ("scatter", _scattered),
    "_reduce_scatter_base": ("scatter", _scattered),
    "reduce_scatter": ("scatter", _scattered),
    "allreduce": ("sum", _reduced),
    "broadcast": ("broadcast", _broadcast),
    "send": ("send", _sent),
}


class Wire:
    """What this rank sent since the last call of `taken`.

    Attributes:
        calls: of each collective, by its name.
        sent: bytes of each collective, by its name; small sums and gathers apart, as "control".
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.sent: dict[str, int] = {}

    def add(self, kind: str, size: int) -> None:
        """One collective that made this rank send so many bytes."""
        kind = "control" if size < SMALL and kind in ("sum", "gather", "broadcast") else kind
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sent[kind] = self.sent.get(kind, 0) + size

    def taken(self) -> dict[str, int]:
        """Bytes by collective, which begin at 0 again."""
        found, self.sent, self.calls = self.sent, {}, {}
        return found


@contextmanager
def counted() -> Iterator[Wire]:
    """Inside, collectives of this process are counted.

    Raises:
        RuntimeError: if this release of torch has none of the methods that are known here.
    """
    wire = Wire()
    kept = {name: vars(dist.ProcessGroup)[name] for name in METHODS if name in vars(dist.ProcessGroup)}
    if not {"exchange", "gather", "scatter", "sum"} <= {METHODS[name][0] for name in kept}:
        raise RuntimeError(f"torch {torch.__version__} names its collectives otherwise: found {sorted(kept)}")
    nested = [False]
    for name in kept:
        method = getattr(dist.ProcessGroup, name)
        setattr(dist.ProcessGroup, name, _counting(wire, nested, method, *METHODS[name]))
    try:
        yield wire
    finally:
        # As the class holds them: what getattr gives of a class of pybind11 takes no self from an instance.
        for name, own in kept.items():
            setattr(dist.ProcessGroup, name, own)


def _counting(
    wire: Wire, nested: list[bool], method: Callable[..., Any], kind: str, size_of: Callable[..., int]
) -> Callable[..., Any]:
    def call(group: Any, *arguments: Any, **options: Any) -> Any:
        if not nested[0]:
            wire.add(kind, size_of(group, *arguments, *options.values()))
        before, nested[0] = nested[0], True  # one may be made of another
        try:
            return method(group, *arguments, **options)
        finally:
            nested[0] = before

    return call


def mean_over_ranks(records: Sequence[dict[str, int]]) -> dict[str, float]:
    """Mean bytes a rank of the records of all ranks."""
    kinds = sorted({kind for record in records for kind in record})
    return {kind: sum(record.get(kind, 0) for record in records) / len(records) for kind in kinds}
