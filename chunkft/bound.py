"""One weight of an attached model with active slices: its leaves, and where their memory was when they were made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft.autograd import Slice, SliceGradients, record, take_forward

_FUNCTIONAL = (os.path.join("nn", "utils", "stateless.py"), os.path.join("_functorch", "functional_call.py"))


@dataclass
class Bound:
    """One parameter with active slices, and where its memory was when they were made."""

    parameter: Tensor
    address: int
    pairs: list[tuple[Slice, nn.Parameter]]
    modules: list[nn.Module] = field(default_factory=list)
    watch: RemovableHandle | None = None
    places: list[tuple[Tensor, int]] = field(default_factory=list)  # where the memory of each sliced leaf was
    holders: Sequence[tuple[Mapping[str, Tensor | None], str]] = field(default_factory=list)
    memory: Callable[[Slice], Tensor] | None = None  # of a leaf, where that is not a part of the weight
    cut_anyway: bool = False  # its whole gradient is computed by plan, and nobody need be told

    def __post_init__(self) -> None:
        self.gradients = SliceGradients(self)

    @property
    def sliced(self) -> bool:
        """Whether its leaves are parts of it; otherwise it is the leaf."""
        return self.pairs[0][0].dim is not None

    def record(self, needed: bool) -> None:
        """Let autograd record what is computed with the weight from now on, or not."""
        for form in self.forms():
            record(form, needed)

    def forms(self) -> Sequence[Tensor]:
        """The parameters that modules may hold as this weight."""
        return (self.parameter,)

    def follow(self) -> bool:
        """Take note by itself of where the weight is now; False: its leaves have to be put there."""
        return False

    def asked(self) -> bool | None:
        """Whether the user wants it trained, where only the flag of the weight tells; None: it is told otherwise."""
        return None

    def note_places(self) -> None:
        """The leaves are where they belong now."""
        self.places = [(leaf, leaf.data_ptr()) for piece, leaf in self.pairs if piece.dim is not None]

    def is_in_place(self) -> bool:
        """Whether weight and leaves are where they were when the leaves were made; it runs in every call."""
        if self.parameter.data_ptr() != self.address:
            return False
        for leaf, place in self.places:  # noqa: SIM110  a generator takes twice as long
            if leaf.data_ptr() != place:
                return False
        return True

    def is_held(self) -> bool:
        """Whether the modules hold this very weight still."""
        for parameters, attribute in self.holders:  # noqa: SIM110  a generator takes twice as long
            if parameters.get(attribute) is not self.parameter:
                return False
        return True

    def gather(self) -> None:
        """Take the values of leaves that were given other memory (``leaf.data = ...``) into the weight.

        Raises:
            RuntimeError: if a leaf has another shape.
        """
        places = {id(leaf): place for leaf, place in self.places}
        for piece, leaf in self.pairs:
            if piece.dim is None or leaf.data_ptr() == places[id(leaf)]:
                continue
            if tuple(leaf.shape) != piece.shape:
                raise RuntimeError(
                    f"the .data of the leaf of {piece} was set to a tensor of shape {tuple(leaf.shape)}; "
                    f"needs {piece.shape}"
                )
            home = self.home(piece)
            home.copy_(leaf.detach())
            leaf.data = home
        self.note_places()

    def home(self, piece: Slice) -> Tensor:
        """The memory that the leaf of a slice is."""
        return piece.of(self.parameter.detach()) if self.memory is None else self.memory(piece)

    def has_hooks(self) -> bool:
        """Whether somebody else watches the gradient of the weight."""
        ours = 0 if self.watch is None else 1
        after = self.parameter._post_accumulate_grad_hooks
        return bool(self.parameter._backward_hooks) or (after is not None and len(after) > ours)

    def uninstall(self) -> None:
        """Give the modules of the weight their own forward back."""
        for module in self.modules:
            take_forward(module, self.pairs)
        self.modules.clear()
        if self.watch is not None:
            self.watch.remove()
            self.watch = None


def is_temporary(weight: Tensor | None) -> bool:
    """Whether what a module holds in place of its weight is there for one call only, and not to be trained.

    Where nothing is recorded nothing is trained, so that a replacement may wait for its first forward pass in grad
    mode.
    """
    return not isinstance(weight, nn.Parameter) or not torch.is_grad_enabled() or is_swapped()


def is_swapped() -> bool:
    """Whether a call runs that puts tensors in the place of parameters and takes them out again at its end.

    ``torch.func.functional_call`` does, with tensors or parameters of another model, and what exports a model, with
    tensors that have no memory.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_FUNCTIONAL):
            return True
        frame = frame.f_back
    return False
