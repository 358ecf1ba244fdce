"""What all ranks of a team do, or none of them: an error on one is an error on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from chunkft.optim.team import Team

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]  # gives the objects of all ranks for this one's; a collective
_KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError, FileNotFoundError, OSError)


class Told(NamedTuple):
    """An error as the other ranks learn of it.

    Attributes:
        rank: that had it.
        kind: name of its class.
        number: ``errno`` of an OSError, else None.
        message: what it says.
    """

    rank: int
    kind: str
    number: int | None
    message: str

    def error(self) -> Exception:
        """One of the same kind and with the same message; a RuntimeError for a kind that is not Python's own."""
        error: Exception
        if self.number is not None:
            error = OSError(self.number, self.message)
        else:
            known = next((kind for kind in _KINDS if kind.__name__ == self.kind), None)
            error = RuntimeError(f"{self.kind}: {self.message}") if known is None else known(self.message)
        error.add_note(f"rank {self.rank} of the group had this error")
        return error


def gathers_of(team: Team | None, doing: str) -> list[Gather]:
    """The collectives that reach all ranks of a team: those that share the slices, then those with the same slices."""
    if team is None:
        return []
    reached = [team.ranks] if team.copies is None else [team.ranks, team.copies]
    return [partial(ranks.objects, doing=doing) for ranks in reached]


def together(gathers: Sequence[Gather], rank: int, action: Callable[[], T]) -> T:
    """Run an action on every rank; if it fails on one, raise on all.

    Args:
        gathers: collectives that reach all ranks; none in a run of one process.
        rank: of this process.
        action: without collectives of its own, or with such as fail on all ranks or on none.

    Returns:
        What it returned here.

    Raises:
        What the first rank that failed raised, on that rank itself; on the others an error of that kind and message.
    """
    own: BaseException | None = None
    result: T | None = None
    try:
        result = action()
    except BaseException as error:
        if not gathers:
            raise
        own = error
    told = None if own is None else _tell(rank, own)
    for gather in gathers:
        told = next((other for other in gather(told) if other is not None), None)
    if own is not None and (not isinstance(own, Exception) or told is None or told == _tell(rank, own)):
        raise own
    if told is not None:
        raise told.error() from own
    return result  # type: ignore[return-value]


def shared(gathers: Sequence[Gather], value: T) -> T:
    """The value of the first rank, on all ranks."""
    for gather in gathers:
        value = gather(value)[0]
    return value


def _tell(rank: int, error: BaseException) -> Told:
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return Told(rank, "FileNotFoundError", None, str(error))
    if isinstance(error, OSError):
        return Told(rank, "OSError", error.errno, error.strerror or str(error))
    return Told(rank, type(error).__name__, None, str(error))
