"""Brings the gradients of active slices to the ranks that own them, while the backward pass goes on."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft.autograd import Slice, hookable
from chunkft.parallel.owners import Bucket, padded
from chunkft.parallel.ranks import Pending, Ranks

Pairs = Sequence[tuple[Slice, nn.Parameter]]
AHEAD = 1  # buckets on their way while the next one is filled: more hold memory, and hide nothing
REDUCING = "reducing gradients"


class Weights(Protocol):
    """Who knows when a backward pass is through with a weight of which slices are active."""

    before_weight: dict[str, Callable[[], None]]
    after_weight: dict[str, Callable[[], None]]

    def backward_reaches(self, name: str) -> bool:
        """Whether the backward pass that runs comes to the weight itself."""


@dataclass
class _Load:
    """A bucket at work.

    Attributes:
        layout: what is in it.
        leaves: as autograd sees them; their gradients are sent.
        own: what this rank owns of it: each leaf, with its place in a tensor of all elements that this rank owns.
        header: number of elements before the gradients in a message, with those that fill it up.
        missing: names whose gradients are not complete in this backward pass.
        pending: while it is on its way.
        sums: what came, over all ranks: of each leaf how many have a gradient, whether one was not finite, and the
            gradients; while it is on its way over copies.
        absent: numbers of the leaves that had no gradient here when it was sent.
        forgotten: whether what is on its way is not wanted any more.
    """

    layout: Bucket
    leaves: list[nn.Parameter]
    own: list[tuple[Slice, nn.Parameter, Slice, int, int]]
    header: int
    missing: set[str] = field(default_factory=set)
    pending: Pending | None = None
    sums: Pending | tuple[Tensor, Tensor] | None = None
    absent: list[int] = field(default_factory=list)
    forgotten: bool = False


class Reducer:
    """Sums the gradients of all ranks at their owners, as means over the ranks.

    A bucket is sent once the last of its gradients is complete, in an order that is the same on all ranks: those that
    got no gradient (an expert without tokens) go at the end of the backward pass, as zeros. Sums over the ranks that
    divide slices are taken in fp32 where they arrive: they are the same at every try, whatever the network.

    They are sent in rounds, in each of which every rank sends all buckets once. Only the last backward pass of a step
    begins one, so that accumulation communicates once a step: how many there are is taken from the step before. In the
    first one, and with a GradScaler, each pass does. What further passes add is sent in ``step()``, where ranks that
    had fewer passes take part, too.

    Where weights are gathered, ranks wait for each other in every block of a backward pass, and a bucket may only leave
    between the same two blocks on all of them. So they say at the beginning of a pass whether it brings gradients of
    all leaves; if not on all ranks (an expert without tokens on some), its buckets leave at its end.

    Args:
        ranks: among whom slices are divided.
        copies: of hybrid sharding, the ranks with the same slices, over which sums go on; or None.
        begin_round: called before the first bucket of a round that a backward pass begins, with whether it is to bring
            gradients of all leaves here; returns whether on all ranks, and raises on all if they cannot have one
            together.
        weights: tells when a weight is not needed any more.
        gathered: whether all ranks take part in what brings weights to the layers of a backward pass.
        arrived: called with own slices as soon as their gradients are there, and with a flag that is not 0 if a
            gradient of the bucket was not finite on some rank; None: nobody needs them before the step.
    """

    def __init__(
        self,
        ranks: Ranks,
        copies: Ranks | None,
        begin_round: Callable[[bool], bool],
        weights: Weights,
        gathered: bool = False,
        arrived: Callable[[Pairs, Tensor], None] | None = None,
    ) -> None:
        self.ranks = ranks
        self.copies = copies
        self.arrived = arrived
        self._begin_round = begin_round
        self._gathered = gathered
        self._weights = weights
        self._loads: list[_Load] = []
        self._of_name: dict[str, list[_Load]] = {}
        self._waiting: dict[str, int] = {}  # leaves of a name without a gradient in this backward pass
        self._read: set[str] = set()  # weights that this backward pass is through with
        self._handles: list[RemovableHandle] = []
        self._next = 0  # the first bucket that was not sent in this round
        self.expected = 1  # backward passes of a step, as far as is known
        # Each pass begins a round, until a step has told who looks at gradients between passes.
        self.every_pass = True
        self.backwards = 0  # passes since the last step
        self.rounds = 0  # since then, with the one under way
        self.under_way = False  # a round has begun, and is not complete
        self._brought = False  # whether some rank had a gradient in this round
        self._at_once = True  # buckets leave as soon as they are complete, not at the end of the pass
        self.cleared = 0  # how often gradients of rounds of this step were forgotten
        self.on_gradient: Callable[[], None] = lambda: None  # the first of a backward pass is about to come
        self.on_send: Callable[[], None] = lambda: None  # the gradients of a bucket are about to leave
        self._running = False

    def bind(self, buckets: Sequence[Bucket], leaves: Mapping[Slice, nn.Parameter], own: Pairs) -> None:
        """These slices are active now."""
        self.release()
        by_name: dict[str, list[tuple[Slice, nn.Parameter]]] = {}
        for piece, leaf in own:
            by_name.setdefault(piece.name, []).append((piece, leaf))
        for pairs in by_name.values():
            pairs.sort(key=_start_of)
        for bucket in buckets:
            self._loads.append(
                _Load(
                    bucket,
                    [leaves[piece] for piece in bucket.leaves],
                    self._own_in(bucket, by_name),
                    padded(self._flags(bucket), leaves[bucket.leaves[0]].element_size()),
                )
            )
            for name in dict.fromkeys(piece.name for piece in bucket.leaves):
                self._of_name.setdefault(name, []).append(self._loads[-1])
        me = weakref.ref(self)  # hooks live in C++, out of sight of the garbage collector

        def first(gradient: Tensor | None = None) -> None:
            reducer = me()
            if reducer is not None:
                reducer._first()

        for piece, leaf in leaves.items():

            def complete(leaf: Tensor, name: str = piece.name) -> None:
                reducer = me()
                if reducer is not None:
                    reducer._came(name)

            def through(name: str = piece.name) -> None:
                reducer = me()
                if reducer is not None:
                    reducer._through(name)

            with hookable(leaf):
                self._handles.append(leaf.register_hook(first))  # type: ignore[no-untyped-call]
                self._handles.append(leaf.register_post_accumulate_grad_hook(complete))  # type: ignore[no-untyped-call]
            self._weights.before_weight[piece.name] = first
            self._weights.after_weight[piece.name] = through
        self._rearm()

    def release(self) -> None:
        """No slice is active any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in self._of_name:
            self._weights.before_weight.pop(name, None)
            self._weights.after_weight.pop(name, None)
        self._loads.clear()
        self._of_name.clear()
        self._next = 0
        self.under_way = self._running = False

    @property
    def is_open(self) -> bool:
        """Whether this rank has gradients that were not sent, or that are on their way."""
        return any(
            load.pending is not None
            or load.sums is not None
            or any(leaf.grad is not None for leaf in load.leaves)
            for load in self._loads
        )

    def begin_backward(self) -> None:
        """A backward pass begins; one before that an error ended is over."""
        self._running = False
        self._rearm()
        self._first()
        if self._gathered:
            self._at_once = False
            if self._sends and not self.under_way:
                self._begin()

    def close_backward(self) -> bool:
        """A backward pass is over: if it was one that sends, what it left goes now, and all arrive.

        Returns:
            Whether it was.
        """
        self._first()  # also of a pass that reached none of the leaves
        sends = self._sends
        self._running = False
        if sends and not self.under_way:
            self._begin()
        self.backwards += 1
        if sends:
            self.flush()
        else:
            self._rearm()
        return sends

    def flush(self) -> None:
        """Complete a round, or have one: all ranks know of it."""
        if not self.under_way:
            self._enter()
        while self._next < len(self._loads):
            self._send(self._next)
        for load in self._loads:
            self._receive(load)
        self.rounds -= not self._brought  # as that of torch.autograd.grad, which is not for leaves
        self._next = 0
        self.under_way = self._running = False
        self._rearm()

    def close_step(self, every_pass: bool) -> None:
        """A step is done: learn how many backward passes it had; ``every_pass`` sends in each from now on."""
        self.expected = self.backwards or self.expected
        self.every_pass = every_pass
        self.backwards = self.rounds = self.cleared = 0
        self._running = False

    def drop(self, anew: bool) -> None:
        """Forget all gradients, also those on their way; ``anew``: the step begins anew, on all ranks.

        A round that is under way stays so: the other ranks wait for its end.
        """
        if self.rounds and not anew:
            self.cleared += 1
        for load in self._loads:
            load.forgotten = load.pending is not None or load.sums is not None
            for leaf in load.leaves:
                leaf.grad = None
        self.backwards = 0
        if anew:
            self.rounds = int(self.under_way)
        self._running = False
        self._rearm()

    def _own_in(
        self, bucket: Bucket, own: Mapping[str, Pairs]
    ) -> list[tuple[Slice, nn.Parameter, Slice, int, int]]:
        """See ``_Load.own``; ``own`` has the pairs of each name in order."""
        found = []
        offset = 0
        rank = self.ranks.rank
        for part, number in zip(bucket.parts[rank], bucket.sources[rank], strict=True):
            pairs = own.get(part.name, ())
            first = bisect_left(pairs, part.start, key=_start_of)
            last = bisect_left(pairs, part.stop, key=_start_of)
            found += [(piece, leaf, part, offset, number) for piece, leaf in pairs[first:last]]
            offset += part.numel
        return found

    def _rearm(self) -> None:
        """Wait for the gradients of a pass."""
        self._waiting = {}
        self._read.clear()
        for load in self._loads:
            load.missing = {piece.name for piece in load.layout.leaves}
            for piece, leaf in zip(load.layout.leaves, load.leaves, strict=True):
                if leaf.requires_grad:
                    self._waiting[piece.name] = self._waiting.get(piece.name, 0) + 1
        for load in self._loads:  # what is frozen gets none
            load.missing = {name for name in load.missing if self._waiting.get(name)}

    @property
    def _sends(self) -> bool:
        """Whether the backward pass that runs takes part in a round."""
        if self.under_way or self.every_pass:
            return True
        return self.backwards + 1 >= self.expected and not self.rounds

    def _begin(self) -> None:
        """Begin a round from a backward pass."""
        self._at_once = self._begin_round(not self._gathered or self._reaches_all())
        self._enter()

    def _reaches_all(self) -> bool:
        """Whether the backward pass that runs brings gradients to all leaves: their own, or cut from their weight's."""
        return all(
            all(map(_is_reached, self._leaves_of(name))) or self._weights.backward_reaches(name)
            for name in self._waiting
        )

    def _leaves_of(self, name: str) -> list[nn.Parameter]:
        return [
            leaf
            for load in self._of_name[name]
            for piece, leaf in zip(load.layout.leaves, load.leaves, strict=True)
            if piece.name == name
        ]

    def _enter(self) -> None:
        self.under_way = True
        self._brought = False
        self.rounds += 1

    def _first(self) -> None:
        if not self._running:
            self._running = True
            self.on_gradient()
            self._running = True

    @torch.no_grad()
    def _came(self, name: str) -> None:
        if name not in self._waiting:
            return
        self._waiting[name] -= 1
        if self._waiting[name]:
            return
        if name in self._read or not self._weights.backward_reaches(name):
            self._done_with(name)

    @torch.no_grad()
    def _through(self, name: str) -> None:
        """The backward pass has come to the weight itself."""
        self._read.add(name)
        if self._waiting.get(name) and not any(map(_is_reached, self._leaves_of(name))):
            self._waiting[name] = 0  # theirs were cut from that of the weight
        self._done_with(name)

    @torch.no_grad()
    def _done_with(self, name: str) -> None:
        """Nothing reads the weight any more; if all gradients of its slices are complete, they can leave."""
        if not self._running or self._waiting.get(name):
            return
        for load in self._of_name.get(name, ()):
            load.missing.discard(name)
        if not (self._sends and self._at_once):
            return
        while self._next < len(self._loads) and not self._loads[self._next].missing:
            if not self.under_way:
                self._begin()
            self._send(self._next)

    @torch.no_grad()
    def _send(self, index: int) -> None:
        """Send the next bucket, and receive those that are to be there by now."""
        load = self._loads[index]
        self.on_send()
        itemsize = load.leaves[0].element_size()
        sizes = [load.header + padded(numel, itemsize) for numel in load.layout.numels()]
        message = self._message(load, sizes)
        for leaf in load.leaves:
            leaf.grad = None
        mine = sizes[self.ranks.rank]
        doing = f"{REDUCING}, bucket {index + 1} of {len(self._loads)}"
        load.pending = self.ranks.exchange(message, sizes, [mine] * self.ranks.size, "gradients", doing)
        load.forgotten = False
        self._next = index + 1
        if index >= AHEAD:
            self._sum_up(self._loads[index - AHEAD])
        ahead = AHEAD if self.copies is None else 2 * AHEAD
        if index >= ahead:
            self._receive(self._loads[index - ahead])

    def _flags(self, bucket: Bucket) -> int:
        """Numbers before the gradients in a message."""
        return len(bucket.leaves) + (self.arrived is not None)

    def _message(self, load: _Load, sizes: Sequence[int]) -> Tensor:
        """What all ranks get of a bucket, one after the other: which leaves have gradients, and its part of them.

        A method of its own: nothing here may hold gradients when the message leaves.
        """
        bucket, sample = load.layout, load.leaves[0]
        message = torch.empty(sum(sizes), dtype=sample.dtype, device=sample.device)
        load.absent = [number for number, leaf in enumerate(load.leaves) if leaf.grad is None]
        head = [float(leaf.grad is not None) for leaf in load.leaves]
        top = torch.tensor(head, dtype=sample.dtype).to(sample.device, non_blocking=True)
        if self.arrived is not None:
            top = torch.cat([top, _spoiled(load.leaves, sample)])
        targets, sources = [], []
        for part, numbers, start in zip(bucket.parts, bucket.sources, _starts_of(sizes), strict=True):
            targets.append(message[start : start + len(top)])
            sources.append(top)
            offset = start + load.header
            for piece, number in zip(part, numbers, strict=True):
                place = message[offset : offset + piece.numel].view(piece.shape)
                offset += piece.numel
                gradient = load.leaves[number].grad
                if gradient is None:
                    place.zero_()
                    continue
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                targets.append(place)
                sources.append(_within(bucket.leaves[number], piece, gradient))
        torch._foreach_copy_(targets, sources)
        return message

    @torch.no_grad()
    def _sum_up(self, load: _Load) -> None:
        """Sum what the ranks sent of a bucket, and begin to sum over copies."""
        if load.pending is None:
            return
        received = load.pending.wait().view(self.ranks.size, -1)
        flags = self._flags(load.layout)
        top = received[:, :flags]
        body = received[:, load.header : load.header + load.layout.numels()[self.ranks.rank]]
        exact = torch.float64 if body.dtype == torch.float64 else torch.float32
        total = body.sum(0, dtype=exact).mul_(1 / self.ranks.size)
        head = top.to(exact).amax(0)
        if self.copies is None:
            load.sums = head, total
        else:  # all of them, whatever is absent here
            load.sums = self.copies.sum(torch.cat([head, total]), "gradients", REDUCING)
        load.pending = None

    @torch.no_grad()
    def _receive(self, load: _Load) -> None:
        """Give the owner's leaves their gradients."""
        self._sum_up(load)
        if load.sums is None:
            return
        if isinstance(load.sums, Pending):
            assert self.copies is not None
            joined, flags = load.sums.wait(), self._flags(load.layout)
            load.sums = joined[:flags], joined[flags:].mul_(1 / self.copies.size)
        head, total = load.sums
        present = head.tolist() if load.absent else [1.0] * len(load.leaves)
        self._brought = self._brought or any(present[: len(load.leaves)])
        gradients = []
        for piece, leaf, part, offset, number in load.own:
            if present[number] and not load.forgotten:
                gradient = _within(part, piece, total[offset : offset + part.numel].view(part.shape))
                gradients.append((piece, leaf, gradient.to(device=leaf.device, dtype=leaf.dtype)))
        load.sums = None  # before that an error loses nothing
        if load.forgotten:
            return
        for _, leaf, gradient in gradients:
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        if self.arrived is not None:
            self.arrived([(piece, leaf) for piece, leaf, _ in gradients], head[-1].clamp(max=1.0))


def _starts_of(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _start_of(pair: tuple[Slice, nn.Parameter]) -> int:
    return pair[0].start


@torch.enable_grad()
def _is_reached(leaf: nn.Parameter) -> bool:
    """Whether the backward pass that runs brings a gradient to a leaf."""
    if not leaf.requires_grad:
        return False
    view: Any = leaf.view_as(leaf)
    try:
        return bool(torch._C._will_engine_execute_node(view.grad_fn.next_functions[0][0]))
    except RuntimeError:  # torch.autograd.grad, which brings them none
        return False


def _within(outer: Slice, inner: Slice, tensor: Tensor) -> Tensor:
    """The part of a tensor of the shape of a slice that another slice, inside of it, names."""
    if outer.dim is None or outer == inner:
        return tensor
    return tensor.narrow(outer.dim, inner.start - outer.start, inner.stop - inner.start)


def _spoiled(leaves: Sequence[nn.Parameter], sample: Tensor) -> Tensor:
    """1 if a gradient is not finite here, else 0, for a header; nobody waits for it."""
    norms = [torch.linalg.vector_norm(leaf.grad, float("inf")) for leaf in leaves if leaf.grad is not None]
    if not norms:
        return torch.zeros(1, dtype=sample.dtype, device=sample.device)
    return (~torch.isfinite(torch.stack(norms).amax())).to(sample.dtype).reshape(1)
