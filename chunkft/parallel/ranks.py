"""The processes that train together: their collectives, with bytes counted and failures explained."""

from __future__ import annotations

import atexit
import contextlib
import functools
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Its name from torch 2.13 on, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
KINDS = ("gradients", "weights", "control")
THREADS_END_WITHIN = 0.2  # seconds: milliseconds are enough, unless the machine is busy

# One for each group of users, whatever the number of optimizers: it is a communicator of its own.
_made = 0
_channels: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_cpu_channels: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_optimizers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # numbers by channel
_voices: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_lost: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # by channel: what failed in it


class Pending:
    """A collective under way, and what it fills.

    Attributes:
        result: complete after ``wait``.
    """

    def __init__(
        self, work: Any, result: Tensor, keep: Tensor, explained: contextlib.AbstractContextManager[None]
    ) -> None:
        self.result = result
        self._work = work
        self._keep: Tensor | None = keep  # is read until the collective is done
        self._explained = explained

    def wait(self) -> Tensor:
        """The result; on a GPU for what comes next on the current stream."""
        if self._work is not None:
            with self._explained:
                self._work.wait()
            self._work = self._keep = None
        return self.result


class Ranks:
    """The processes of a group, as one of them sees them.

    Collectives run in a communicator of their own with the members of ``group``: those of ours begin inside of backward
    passes, and must not come between other people's, whose order on the other ranks may be another one.

    Args:
        group: a process group that this process belongs to; building is a collective of its members.

    Attributes:
        size: number of processes.
        rank: of this one, 0 to ``size`` - 1.
        channel: the communicator.
        during: when collectives take place, for error messages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        _wait_for_threads_at_exit()
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self.channel = channel_of(group)
        self._voice = _voice_of(self.channel)
        self.during = "construction"
        self._sent = dict.fromkeys(KINDS, 0)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Explain failures; after the first one nothing more is tried: nobody knows where the other ranks are."""
        doing = f"{doing} in {self.during}"
        lost = _lost.get(self.channel)
        if lost is not None:
            raise RuntimeError(
                f"{doing}: not possible after a collective failed before, which was {lost}; restart all processes "
                "from the last checkpoint"
            )
        try:
            with explained(doing):
                yield
        except RuntimeError:
            _lost[self.channel] = doing
            raise

    def number(self) -> int:
        """The next of the optimizers of these processes, which build them in the same order."""
        _optimizers[self.channel] = number = _optimizers.get(self.channel, 0) + 1
        return number

    def exchange(
        self, sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], kind: str, doing: str
    ) -> Pending:
        """Begin an all-to-all of parts of a flat tensor.

        Args:
            sent: 1-d; its parts, of ``send_sizes`` elements, go to the ranks in order.
            send_sizes: number of elements for each rank.
            receive_sizes: number of elements from each rank, in this order in the result.
            kind: what the bytes count as.
            doing: for error messages.
        """
        received = sent.new_empty(sum(receive_sizes))
        with self._explained(doing):
            work = dist.all_to_all_single(
                received, sent, list(receive_sizes), list(send_sizes), group=self.channel, async_op=True
            )
        self._sent[kind] += (sum(send_sizes) - send_sizes[self.rank]) * sent.element_size()
        return Pending(work, received, sent, self._explained(doing))

    def spread(self, own: Tensor, kind: str, doing: str) -> Pending:
        """Begin an all-gather of flat tensors of equal size; the result holds them by rank."""
        everything = own.new_empty(self.size * own.numel())
        with self._explained(doing):
            work = _all_gather(everything, own, group=self.channel, async_op=True)
        self._sent[kind] += (self.size - 1) * own.numel() * own.element_size()
        return Pending(work, everything, own, self._explained(doing))

    def sum(self, values: Tensor, kind: str, doing: str) -> Pending:
        """Begin to sum over the ranks, in place."""
        with self._explained(doing):
            work = dist.all_reduce(values, group=self.channel, async_op=True)
        self._sent[kind] += 2 * (self.size - 1) * values.numel() * values.element_size() // self.size
        return Pending(work, values, values, self._explained(doing))

    def total(self, values: Tensor, doing: str) -> Tensor:
        """Sums over the ranks, in place."""
        return self.sum(values, "control", doing).wait()

    def announce(self, numbers: Tensor, device: torch.device, doing: str) -> list[float]:
        """Sums over the ranks that the host reads.

        They travel between CPUs where that can be, so that the host waits for the other hosts, and not for what its GPU
        has to do.

        Args:
            numbers: on the CPU.
            device: where a group without CPUs has its collectives.
            doing: for error messages.
        """
        channel = self._voice
        if channel is None:
            channel, numbers = self.channel, numbers.to(device)
        with self._explained(doing):
            dist.all_reduce(numbers, group=channel)
        self._sent["control"] += 2 * (self.size - 1) * numbers.numel() * numbers.element_size() // self.size
        sums: list[float] = numbers.tolist()
        return sums

    def announced(self, numbers: Tensor, device: torch.device, doing: str) -> list[Tensor]:
        """What all ranks announce; the tensors have the same shape, and are on the CPU. See ``announce``."""
        channel = self._voice
        if channel is None:
            channel, numbers = self.channel, numbers.to(device)
        found = [torch.empty_like(numbers) for _ in range(self.size)]
        with self._explained(doing):
            dist.all_gather(found, numbers, group=channel)
        self._sent["control"] += (self.size - 1) * numbers.numel() * numbers.element_size()
        return [one.cpu() for one in found]

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor], doing: str) -> None:
        """Give all ranks the values that rank 0 of the group has."""
        for tensor in tensors:
            if tensor.is_meta or not tensor.numel():
                continue
            values = tensor.detach().contiguous()
            with self._explained(doing):
                dist.broadcast(values, group=self.channel, group_src=0)
            if values.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(values)

    def objects(self, value: Any, doing: str) -> list[Any]:
        """The objects of all ranks, pickled on the way."""
        found: list[Any] = [None] * self.size
        with self._explained(doing):
            dist.all_gather_object(found, value, group=self._voice or self.channel)
        return found

    def post(self, device: torch.device) -> torch.device:
        """Where tensors are to be that ``send``, ``receive`` and ``share`` move: on the CPU, where that can be.

        Args:
            device: where a group without CPUs has its collectives.
        """
        return device if self._voice is None else torch.device("cpu")

    def send(self, tensor: Tensor, to: int, doing: str) -> None:
        """Send a contiguous tensor to a rank of the group that calls ``receive``."""
        with self._explained(doing):
            dist.send(tensor, group=self._voice or self.channel, group_dst=to)

    def receive(self, into: Tensor, source: int, doing: str) -> None:
        """Fill a contiguous tensor with what a rank sends."""
        with self._explained(doing):
            dist.recv(into, group=self._voice or self.channel, group_src=source)

    def share(self, tensor: Tensor, source: int, doing: str) -> None:
        """Fill a contiguous tensor on every rank with that of one of them; all call it."""
        with self._explained(doing):
            dist.broadcast(tensor, group=self._voice or self.channel, group_src=source)

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank sent since the last call, by kind: a ring is assumed for what has several ways."""
        sent, self._sent = self._sent, dict.fromkeys(KINDS, 0)
        return sent


def channel_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A communicator of the members of a group that nobody else uses; made once, by all of them together."""
    return _made_once(_channels, group, "making a communicator of its own", None)


def cpu_channel_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A communicator of the members of a group over CPUs (gloo), for threads that work beside training.

    Raises:
        RuntimeError: if torch was built without gloo.
    """
    if not dist.is_gloo_available():
        raise RuntimeError(
            "the backend 'gloo' is not available in this build of torch; sharded checkpoints need it for the ranks to "
            "agree while they train on"
        )
    return _made_once(_cpu_channels, group, "making a communicator over CPUs", "gloo")


def _voice_of(channel: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Where the ranks of a communicator sum up numbers of their hosts: itself, if it has CPUs; None: nowhere."""
    if _has_cpus(channel):
        return channel
    if not dist.is_gloo_available():
        return None
    return _made_once(_voices, channel, "making a communicator over CPUs", "gloo")


def _has_cpus(group: dist.ProcessGroup) -> bool:
    return torch.device("cpu") in group._device_types


@functools.cache
def _wait_for_threads_at_exit() -> None:
    """Let threads of gloo end what they do before the interpreter ends.

    They take the GIL to drop the tensors of their last collective, a moment after that is done. One that asks for it
    when the interpreter has begun to end takes the process down ("terminate called without an active exception", torch
    2.11 to 2.13), after a run that went well. Nothing tells when they are through.
    """
    atexit.register(time.sleep, THREADS_END_WITHIN)


def _made_once(known: Any, group: dist.ProcessGroup, doing: str, backend: str | None) -> dist.ProcessGroup:
    found = known.get(group)
    if found is None or found not in dist.distributed_c10d._world.pg_map:
        with explained(doing):
            found = _new_group_like(group, backend)
        known[group] = found
    result: dist.ProcessGroup = found
    return result


def objects_of(group: dist.ProcessGroup, value: Any, doing: str) -> list[Any]:
    """The objects of all ranks of a group, pickled on the way."""
    found: list[Any] = [None] * group.size()
    with explained(doing):
        dist.all_gather_object(found, value, group=group)
    return found


def _new_group_like(group: dist.ProcessGroup, backend: str | None = None) -> Any:
    """Another group of the members of one, made by them alone.

    Such groups get a name from their members and the number of groups that a process knows (torch 2.11 to 2.13), which
    members of different other groups know differently many of: they would wait under different names. So they agree on
    a number, that no such group had before.
    """
    global _made
    ranks = dist.get_process_group_ranks(group)
    names: dict[Any, Any] = dist.distributed_c10d._world.pg_names
    found: list[Any] = [None] * len(ranks)
    dist.all_gather_object(found, max(len(names), _made), group=group)
    _made = max(found) + 1
    fillers = [object() for _ in range(_made - len(names))]
    names.update((filler, f"filler {number}") for number, filler in enumerate(fillers))
    try:
        with _unbound():
            return dist.new_group(
                ranks,
                timeout=_timeout_of(group),
                backend=backend or dist.get_backend_config(group),
                use_local_synchronization=True,
            )
    finally:
        for filler in fillers:
            names.pop(filler, None)


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """Let groups be made by their members: those of a world that is bound to devices are split by all of its ranks."""
    world: Any = dist.distributed_c10d._get_default_group()
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


def _timeout_of(group: dist.ProcessGroup) -> Any:
    """How long collectives of a group wait; None: as long as is usual for its kind."""
    for device in (torch.device("cuda"), torch.device("cpu")):
        with contextlib.suppress(RuntimeError, AttributeError):
            return group._get_backend(device).options._timeout
    return None


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Say what a collective that failed was for, and what the usual causes are."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{doing}: a process of the group did not take part. It died, raised an error, left its loop (a different "
            f"number of batches), or it waits in another collective; look at the first error of the other ranks. "
            f"The backend says: {error}"
        ) from error
