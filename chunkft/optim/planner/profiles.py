"""What the parts of a training step hold: before the blocks, each kind of block, and after them."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from chunkft.attach import attach
from chunkft.autograd import Slice
from chunkft.optim.planner.tape import Tape
from chunkft.optim.planner.tiles import parked, tiled
from chunkft.optim.planner.twin import Shallow, Step
from chunkft.plan import parameter_specs
from chunkft.weights import Table

# The modules: the package has a function of the name of one of them.
USERS_OF_BLOCKS = tuple(sys.modules[f"chunkft.kernels.{name}"] for name in ("torch_wgrad", "wgrad"))

__all__ = ["Profiles", "Run", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Memory of one part of a step, gradients of parameters left out, over what was there when it began.

    Attributes:
        peaks: the most bytes until the first event, from there to the second, and so on.
        events: ``"+name"`` where the gradient of a parameter begins to exist, ``"-name"`` where it is complete and may
            be used; one less than there are peaks.
        levels: bytes at each event.
        delta: bytes more, or less, at its end than at its beginning.
    """

    peaks: tuple[int, ...] = (0,)
    events: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    delta: int = 0


NOTHING = Segment()
Parts = dict[int | str, Segment]  # a block's number, "pre" or "tail"


@dataclass(frozen=True)
class Run:
    """One training step.

    Attributes:
        forward: what each part holds in the forward pass.
        backward: likewise in the backward pass; parts that it does not reach are not in it.
        input_nbytes: of the input of a block.
    """

    forward: Parts
    backward: Parts
    input_nbytes: int


class Profiles:
    """Runs a shallow model on the meta device with some slices active, each set of them once.

    Args:
        shallow: the model.
        step: computes its loss.
        batch: sequences.
        tokens: of each.
        checkpointing: whether blocks are recomputed in the backward pass; None leaves that as the model has it.
        device: ``"cuda"`` or ``"cpu"``: where attention will run.
        tables: matrices that layers multiply with by tiles.
        parks: whether blocks are recomputed as those are whose input is parked in host memory.
    """

    def __init__(
        self,
        shallow: Shallow,
        step: Step,
        batch: int,
        tokens: int,
        checkpointing: bool | None,
        device: str,
        tables: Sequence[Table] = (),
        parks: bool = False,
    ) -> None:
        self._tables = tables
        self._parks = parks
        self.shallow = shallow
        self._step = step
        self._sizes = (batch, tokens)
        self._device = device
        self._known: dict[tuple[Any, ...], Run] = {}
        self._checkpointing = checkpointing
        self._all = [
            spec.slice(spec.dims[0], 0, spec.shape[spec.dims[0]]) if spec.dims else spec.whole()
            for spec in parameter_specs(shallow.model)
        ]

    def run(self, slices: Sequence[Slice] = (), feed: bool = False, grad: bool = True) -> Run:
        """A step with these slices active.

        Args:
            slices: of parameters of the shallow model.
            feed: whether the input of the first block gets a gradient, as if something below it were active.
            grad: False runs the forward pass alone, without autograd.
        """
        key = (tuple((s.name, s.dim, s.start, s.stop) for s in slices), feed, grad)
        if key not in self._known:
            self._known[key] = self._run(slices, feed, grad)
        return self._known[key]

    def idle(self) -> Run:
        """A step that no gradient flows through the blocks of: with something after them active, if there is that."""
        prefixes = tuple(f"{name}." for name in self.shallow.blocks)
        outside = [piece for piece in self._all if not piece.name.startswith(prefixes)]
        for piece in outside[:-3:-1]:
            found = self.run((piece,))
            if set(found.backward) <= {"tail"}:
                return found
        return self.run(grad=False)

    def whole(self, kind: int) -> tuple[Slice, ...]:
        """All of a block's trainable parameters."""
        prefix = self.shallow.blocks[kind] + "."
        return tuple(piece for piece in self._all if piece.name.startswith(prefix))

    def _run(self, slices: Sequence[Slice], feed: bool, grad: bool) -> Run:
        model = self.shallow.model
        set_checkpointing(model, self._checkpointing)
        with contextlib.ExitStack() as stack:
            slots = [stack.enter_context(tiled(model, table)) for table in self._tables if table.multiplies]
            if self._parks:
                stack.enter_context(parked(model, self.shallow.blocks))
            return self._attached(model, slots, slices, feed, grad)

    def _attached(
        self, model: nn.Module, slots: Sequence[Tensor], slices: Sequence[Slice], feed: bool, grad: bool
    ) -> Run:
        attachment = attach(model)
        try:
            attachment.freeze()
            attachment.activate(tuple(slices))
            recorder = _Recorder(self.shallow, feed)
            for slot in slots:
                recorder.tape.given(slot)
            for piece, leaf in attachment.active():
                recorder.watch(piece.name, leaf)
            with contextlib.ExitStack() as stack:
                stack.enter_context(_on_meta(self._device))
                stack.enter_context(recorder)
                stack.enter_context(torch.set_grad_enabled(grad))
                loss = self._step(model, *self._sizes)
                recorder.turn()
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                recorder.tape.mark("end")
                del loss
            return Run(*recorder.parts(), recorder.input_nbytes)
        finally:
            attachment.detach()
            for parameter in model.parameters():
                parameter.grad = None


def set_checkpointing(model: nn.Module, wanted: bool | None) -> None:
    """Turn activation checkpointing of a transformers model on or off; None leaves it."""
    if wanted is None:
        return
    if not wanted:
        disable = getattr(model, "activation_checkpointing_disable", None) or getattr(
            model, "gradient_checkpointing_disable", None
        )
        if disable is not None:
            disable()
        return
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None):
        model.disable_input_require_grads()  # type: ignore[operator]


class _Recorder:
    """A tape with marks where the parts of the step begin."""

    def __init__(self, shallow: Shallow, feed: bool) -> None:
        self.tape = Tape()
        self._shallow = shallow
        self._feed = feed
        self._forward = True
        self._inside = False
        self._entered: set[int] = set()
        self._tail_begun = False
        self._hooks: list[Any] = []
        self._turned = 0
        self.input_nbytes = 0

    def watch(self, name: str, leaf: Tensor) -> None:
        """Note the gradient of a leaf."""
        leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda done: self.tape.gradient(name, done.grad)
        )

    def __enter__(self) -> _Recorder:
        model = self._shallow.model
        for tensor in [*model.parameters(), *model.buffers()]:
            self.tape.given(tensor)
        for number, name in enumerate(self._shallow.blocks):
            block = model.get_submodule(name)
            self._hooks += [
                block.register_forward_pre_hook(self._entering(number), with_kwargs=True),
                block.register_forward_hook(self._leaving(number)),
            ]
        self._hooks.append(module_hooks.register_module_forward_pre_hook(self._any_module))
        self.tape.mark("pre")
        self.tape.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.tape.__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def turn(self) -> None:
        """The forward pass is over."""
        self._forward = False
        self.tape.mark("turn")
        self._turned = self.tape.clock

    def parts(self) -> tuple[Parts, Parts]:
        """Segments of the forward and of the backward pass."""
        marks = self.tape.marks
        forward: Parts = {}
        backward: Parts = {}
        series = _Series(self.tape)
        for (name, begin), (_, end) in itertools.pairwise(marks):
            side = forward if end <= self._turned else backward
            key: int | str = "tail" if name == "turn" else int(name) if name.isdigit() else name
            side[key] = series.segment(begin, end)
        return forward, backward

    def _entering(self, number: int) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if number == 0 and self._feed:
                args, kwargs = _fed(args, kwargs)
            if not self._forward or number in self._entered:
                return args, kwargs
            self._entered.add(number)
            self._inside = True
            self.tape.mark(str(number))
            x = _first_tensor(args, kwargs)
            if x is not None:
                self.input_nbytes = x.numel() * x.element_size()
            if x is not None and x.requires_grad:
                before = "pre" if number == 0 else str(number - 1)
                x.register_hook(lambda gradient: self.tape.mark(before))  # type: ignore[no-untyped-call]
            return args, kwargs

        return hook

    def _leaving(self, number: int) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            if not self._forward:
                return
            self._inside = False
            y = _first_tensor(output if isinstance(output, tuple) else (output,), {})
            if number == len(self._shallow.blocks) - 1 and y is not None and y.requires_grad:
                y.register_hook(lambda gradient: self.tape.mark(str(number)))  # type: ignore[no-untyped-call]

        return hook

    def _any_module(self, module: nn.Module, args: Any) -> None:
        last = len(self._shallow.blocks) - 1
        if self._forward and not self._inside and not self._tail_begun and last in self._entered:
            self._tail_begun = True
            self.tape.mark("tail")


class _Series:
    """Bytes that exist after each event of a tape, gradients of parameters left out."""

    def __init__(self, tape: Tape) -> None:
        self._bytes = [0] * (tape.clock + 2)
        begun: dict[str, int] = {}  # several slices of a parameter are one gradient
        for made in tape.allocations:
            if made.gradient_of:
                begun.setdefault(made.gradient_of, made.born)
                continue
            self._bytes[made.born] += made.nbytes
            if made.freed is not None:
                self._bytes[made.freed] -= made.nbytes
        for clock in range(1, len(self._bytes)):
            self._bytes[clock] += self._bytes[clock - 1]
        self._events = {clock: f"-{name}" for name, clock in dict(tape.complete).items()}
        self._events |= {clock: f"+{name}" for name, clock in begun.items()}

    def segment(self, begin: int, end: int) -> Segment:
        """What lies between two moments."""
        base = self._bytes[begin]
        peaks, events, levels = [0], [], []
        for clock in range(begin, end + 1):
            level = self._bytes[clock] - base
            if begin < clock and clock in self._events:
                events.append(self._events[clock])
                levels.append(level)
                peaks.append(level)
            peaks[-1] = max(peaks[-1], level)
        return Segment(tuple(peaks), tuple(events), tuple(levels), self._bytes[end] - base)


class _Attention(torch.autograd.Function):
    """Allocates what flash attention does: output and fp32 sums forward; three gradients, and on a GPU an fp32
    accumulator and sums, backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, on_gpu: bool) -> Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, tokens, dtype=torch.float32))
        ctx.on_gpu = on_gpu
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, _, sums = ctx.saved_tensors
        working = (q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(sums)) if ctx.on_gpu else ()
        found = (*(torch.empty_like(t) for t in (q, k, v)), None)
        del working
        return found


@contextlib.contextmanager
def _on_meta(device: str) -> Iterator[None]:
    """Attention and gradients of slices as on the device, and counts of what depends on data at their largest."""
    ordinary = torch.nn.functional.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *args: Any, **options: Any
    ) -> Tensor:
        if attn_mask is not None:
            return ordinary(q, k, v, attn_mask, *args, **options)
        return _Attention.apply(q, k, v, device == "cuda")  # type: ignore[no-any-return, no-untyped-call]

    def in_blocks(matrix: Tensor) -> bool:
        return device == "cpu" and matrix.dtype == torch.float32

    settings = torch.fx.experimental._config
    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(settings, "meta_nonzero_assume_all_nonzero", True),
        contextlib.ExitStack() as stack,
    ):
        for module in USERS_OF_BLOCKS:
            stack.enter_context(mock.patch.object(module, "needs_blocks", in_blocks))
        yield


def _first_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)


def _fed(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments with a first tensor that requires a gradient."""
    given, options = list(args), dict(kwargs)
    holders: tuple[tuple[Any, list[Any]], ...] = ((given, [*range(len(given))]), (options, list(options)))
    for holder, keys in holders:
        for key in keys:
            if isinstance(holder[key], Tensor):
                holder[key] = holder[key].detach().requires_grad_(True)
                return tuple(given), options
    return tuple(given), options
