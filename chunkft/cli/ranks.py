"""What the processes of a run tell each other: numbers, whether all are well, and what went wrong with one."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from chunkft.cli.errors import PeerError, UserError

__all__ = ["Ranks", "describe"]

# Of `chunkft.parallel`, and of gloo, which names its source: its errors have no class of their own.
OF_A_COLLECTIVE = re.compile(
    r": (a process of the group did not take part\.|not possible after a collective failed before)"
    r"|/gloo/\w[\w/]*\.\w+:\d+\]"
)
FAILED = "failed"
STORE_LIMIT = timedelta(seconds=5)


class Ranks:
    """The processes of a run, one of which is this; a process that runs alone has no group.

    Args:
        rank: number of this process.
        world: number of processes.
        control: group of the small messages, on the CPU.
        store: where a process that fails leaves its reason.
    """

    def __init__(self, rank: int = 0, world: int = 1, control: Any = None, store: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._control = control
        self._store = store

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process."""
        return self._control is not None

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def leave(self) -> None:
        """Let go of the group; nothing is told any more."""
        self._control = None

    def table(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, in the order of ranks; each gives as many, exact up to 2**53."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if not self.several:
            return [own.tolist()]
        import torch.distributed as dist

        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own, group=self._control)
        return [row.tolist() for row in rows]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of an fp64 tensor on the CPU, in place."""
        if self.several:
            import torch.distributed as dist

            dist.all_reduce(values, group=self._control)
        return values

    def objects(self, value: Any) -> list[Any]:
        """A value that can be pickled, of every rank, in the order of ranks."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def of_first(self, value: Any) -> Any:
        """The value that rank 0 has."""
        if not self.several:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def meet(self, error: Exception | None = None) -> None:
        """Wait for all ranks, and raise on each if one brings an error: that rank its own, the others PeerError."""
        if not self.several:
            if error is not None:
                raise error
            return
        try:
            found = self.objects(None if error is None else (isinstance(error, UserError), describe(error)))
        except Exception:
            if error is not None:
                raise error from None
            raise
        failed = [rank for rank, entry in enumerate(found) if entry is not None]
        if not failed:
            return
        usage, text = found[failed[0]]
        if error is None:
            raise PeerError(f"stopped, because rank {failed[0]} failed: {text}", silent=usage, usage=usage)
        if self.rank != failed[0] and found[self.rank] == found[failed[0]]:
            raise PeerError(text, silent=True, usage=usage) from error  # one of them says it
        raise error

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """All ranks leave the block together; if one raises inside, all do."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.meet(error)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns what a collective says of a rank that is gone into a PeerError with the reason that it left.

        An error of this rank itself is left for the others to read, and goes on.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if not self.several:
                raise
            other = self._tell(error)
            if other is not None:
                raise other from error
            raise

    def _tell(self, error: Exception) -> PeerError | None:
        """Leave a reason; or what to raise because another rank was first, or is gone without a word."""
        text = describe(error)
        of_group = _of_a_collective(error)
        told = ""
        try:
            self._store.set_timeout(STORE_LIMIT)
            if of_group:
                told = self._store.get(FAILED).decode() if self._store.check([FAILED]) else ""
            else:
                mine = f"{self.rank} {text}"
                found = self._store.compare_set(FAILED, "", mine).decode()
                told = "" if found == mine else found
        except Exception:  # the store went with the process that kept it
            told = ""
        rank, _, reason = told.partition(" ")
        if not of_group:
            return PeerError(text, silent=True) if told and reason == text else None
        if told:
            return PeerError(f"stopped, because rank {rank} failed: {reason}")
        return PeerError(f"stopped, because another rank ended or did not answer: {text}")


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _of_a_collective(error: Exception) -> bool:
    """Whether torch, or what called it for a collective, says that one failed; other errors quote what they like."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and OF_A_COLLECTIVE.search(str(error)) is not None
