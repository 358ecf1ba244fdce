"""The active slices of a model at work: their leaves, and the forwards and hooks that are in its modules for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils.hooks import RemovableHandle

from chunkft.autograd import (
    Passes,
    ReentrantGuard,
    Slice,
    SlicedForward,
    SliceGradients,
    is_transformed,
    operator_for,
    put_forward,
    record,
    records,
)
from chunkft.bound import Bound, is_temporary
from chunkft.places import Owners, Places, holders_of
from chunkft.plan import ParameterSpec
from chunkft.readers import Notices, cutter


class Residence(Protocol):
    """Where weights live that are not always where the model computes.

    Attributes:
        on_device: whether their leaves are where the model computes.
        copies: whether leaves are copies, which take memory beside their weights.
        device: where it does.
    """

    on_device: bool
    copies: bool
    device: torch.device

    def memory(self) -> dict[str, int]:
        """Bytes of the weights: see ``WeightStream.memory``."""

    def streams(self, name: str) -> bool:
        """Whether this is about a weight at all."""

    def device_of(self, name: str) -> torch.device:
        """Where its leaves are."""

    def values(self, piece: Slice) -> Tensor:
        """The memory that the leaf of a slice is to be; the same at every call until ``forget``."""

    def made(self, piece: Slice, leaf: nn.Parameter, watcher: SliceGradients | None) -> None:
        """There is a leaf with this memory; its gradients are to be shown by ``watcher``."""

    def settle(self) -> None:
        """Put in order where weights are that an interrupt left half moved."""

    def updating(self) -> None:
        """Leaves are about to be changed."""

    def publish(self) -> None:
        """Leaves were changed."""

    def forget(self) -> None:
        """The leaves are not used any more."""

    def nbytes(self) -> int:
        """Bytes on the device of leaves that are no part of a weight there."""

    def bound(self, name: str) -> Bound | None:
        """What is to stand for a weight with active slices; None: the parameter that modules hold, as it is."""

    def places(self, specs: Sequence[ParameterSpec]) -> Places | None:
        """What is to look for its parameters in the model; None: ``Places``."""

    def leave(self) -> None:
        """The model is trained no more."""


class Wiring:
    """The weights with active slices, and what they need in the model.

    Args:
        passes: the forward passes of the model.
        untrained: names of parameters that were frozen; their owner changes it.
        verify: weak reference to what looks for weights that were moved or replaced, and calls ``rebind`` for them.

    Attributes:
        bound: the weights by name.
        generation: counts how often leaves were replaced by other objects, for those who keep references.
        notices: what users are told once.
        before_weight: for names of sliced weights what is called before a gradient of the weight itself is cut.
        after_weight: for names of sliced weights what is called once a backward pass is through with the weight itself.
        shows_gradients: whether ``weight.grad`` stands for the gradients of a weight's active slices, so that code
            which knows the weights only can clip and clear them; for slices that are bound from then on.
        residence: where leaves are whose weights are not always on the device, or None.
    """

    def __init__(
        self, passes: Passes, untrained: set[str], verify: Callable[[], Callable[[], None] | None]
    ) -> None:
        self.bound: dict[str, Bound] = {}
        self.generation = 0
        self.notices = Notices()
        self.before_weight: dict[str, Callable[[], None]] = {}
        self.after_weight: dict[str, Callable[[], None]] = {}
        self.shows_gradients = False
        self.residence: Residence | None = None
        self._guard = ReentrantGuard(passes)
        self._untrained = untrained
        self._order: list[Slice] = []
        self._verify_weakly = verify

    def bind(self, wanted: Sequence[Slice], current: Mapping[str, nn.Parameter], owners: Owners) -> None:
        """Make these slices of the current parameters the active ones, in place of those that were so before."""
        self.release()
        self._order = list(wanted)
        for piece in wanted:
            parameter = current[piece.name]
            bound = self.bound.get(piece.name)
            if bound is None:
                if piece.dim is not None:
                    parameter.grad = None  # from before its turn
                self.bound[piece.name] = bound = self._new(piece, parameter)
            bound.pairs.append((piece, self._leaf(piece, parameter, bound)))
            bound.note_places()
        for name, bound in self.bound.items():
            self._install(name, bound, owners[name])

    def _new(self, piece: Slice, parameter: nn.Parameter) -> Bound:
        lives_elsewhere = (
            piece.dim is not None and self.residence is not None and self.residence.streams(piece.name)
        )
        if not lives_elsewhere or self.residence is None:
            return Bound(parameter, parameter.data_ptr(), [])
        bound = self.residence.bound(piece.name) or Bound(parameter, parameter.data_ptr(), [])
        bound.memory = self.residence.values
        return bound

    def moved(self, name: str, address: int) -> None:
        """The memory of a weight is another one for a while, which everybody knows of."""
        bound = self.bound.get(name)
        if bound is not None:
            bound.address = address

    def names(self) -> Collection[str]:
        """Names of the parameters with active slices."""
        return list(self.bound)

    def updating(self) -> None:
        """Leaves are about to be updated."""
        if self.residence is not None:
            self.residence.updating()

    def publish(self) -> None:
        """Leaves were updated: let weights that live elsewhere have it."""
        if self.residence is not None:
            self.residence.publish()

    def active(self) -> list[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and its leaf, in the order in which they were activated."""
        for bound in self.bound.values():
            if bound.sliced:
                bound.gradients.follow(self.shows_gradients)
        leaves = {piece: leaf for bound in self.bound.values() for piece, leaf in bound.pairs}
        return [(piece, leaves[piece]) for piece in self._order]

    def gather(self) -> None:
        """Take the values of leaves whose ``.data`` was replaced into their weights.

        Raises:
            RuntimeError: if they have another shape.
        """
        for bound in self.bound.values():
            if not bound.is_in_place() and bound.parameter.data_ptr() == bound.address:
                bound.gather()

    def holds_active(self) -> bool:
        """Whether the model holds the weights with active slices still, where they were."""
        with DisableTorchFunctionSubclass():  # which every look at a parameter of a class of its own asks for
            for bound in self.bound.values():
                if not (bound.is_held() and bound.is_in_place()):
                    return False
        return True

    def show_gradients(self) -> None:
        """Let ``weight.grad`` stand for gradients of slices that did not come from a backward pass."""
        for bound in self.bound.values():
            if self.shows_gradients:
                bound.gradients.show()

    def carrier(self, model: nn.Module) -> tuple[Tensor, SliceGradients | None] | None:
        """A weight of the model whose ``.grad`` is not in use, and the gradients of its slices if some are active.

        Returns:
            None if there is none.
        """
        for bound in self.bound.values():
            if bound.pairs[0][0].dim is not None:
                return bound.forms()[0], bound.gradients
        taken = {id(bound.parameter) for bound in self.bound.values()}
        rest = (p for p in model.parameters() if not records(p) and id(p) not in taken)
        return next(((p, None) for p in rest), None)

    def backward_reaches(self, name: str) -> bool:
        """Whether the backward pass that runs comes to a sliced weight itself, at its end, beside its leaves.

        Before that, some reader of the weight may still need its values.
        """
        bound = self.bound.get(name)
        if bound is None or bound.watch is None or not records(bound.parameter):
            return False
        with torch.enable_grad():
            view: Any = bound.parameter.view_as(bound.parameter)
        return bool(torch._C._will_engine_execute_node(view.grad_fn.next_functions[0][0]))

    def hide_gradients(self) -> None:
        """Set the ``weight.grad`` that stand for gradients of slices to None."""
        for bound in self.bound.values():
            bound.gradients.hide()

    def set_trained(self, name: str, trained: bool) -> None:
        """Let autograd record a weight and its leaves from now on, or not; nothing happens if it is not active."""
        bound = self.bound.get(name)
        if bound is None:
            return
        bound.record(trained)
        for _, leaf in bound.pairs:
            record(leaf, trained)
        if bound.sliced and trained and bound.watch is None:
            bound.watch = self._watch(name, bound)

    def hook_ids(self) -> list[int]:
        """Keys of the hooks in their modules' hook dicts."""
        return self._guard.hook_ids()

    def release(self) -> None:
        """Make no slice active, and give the modules their own forward back."""
        self._guard.release()
        if self.residence is not None:
            self.residence.forget()
        for bound in self.bound.values():
            bound.uninstall()
            bound.gradients.hide()
            bound.record(False)
            for _, leaf in bound.pairs:
                leaf.grad = None
            bound.places.clear()
            bound.pairs.clear()  # a wrapper may have kept the sliced forward: from now on it is the plain one
        self.bound.clear()
        self._order = []

    def rebind(self, name: str, parameter: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]) -> None:
        """Follow a weight that was moved, or replaced by this parameter, or whose leaves were; else do nothing."""
        bound = self.bound[name]
        asked = bound.asked()
        if asked is not None and asked != records(bound.pairs[0][1]):
            (self._untrained.discard if asked else self._untrained.add)(name)
            self.set_trained(name, asked)
        in_place = bound.is_in_place()
        if bound.follow():
            self.generation += not in_place
            return
        replaced = parameter is not bound.parameter
        if not replaced and in_place:
            return
        bound.gradients.settle()
        if bound.memory is not None and self.residence is not None:
            self.residence.settle()
        if bound.memory is not None and (replaced or parameter.data_ptr() != bound.address):
            raise RuntimeError(
                f"parameter {name!r} was moved or replaced while its weights stream; detach() the optimizer first, "
                "change the model, then build a new one"
            )
        if not replaced and parameter.data_ptr() == bound.address:
            bound.gather()
            return
        # that of a new parameter counts in place of the old one's
        own_gradient = replaced and parameter.grad is not None
        for i, (piece, leaf) in enumerate(bound.pairs):
            grad, leaf.grad = leaf.grad, None
            if piece.dim is not None:  # the same leaf: a gradient may be on its way to it
                leaf.data = piece.of(parameter.detach())
                record(leaf, name not in self._untrained)
            elif replaced:
                bound.pairs[i] = piece, self._leaf(piece, parameter, bound)
                self.generation += 1
            if grad is not None and not own_gradient:
                bound.pairs[i][1].grad = grad.to(parameter.device)
        bound.gradients.hide()
        if replaced:
            bound.uninstall()
        bound.parameter, bound.address = parameter, parameter.data_ptr()
        bound.note_places()
        if self.shows_gradients:
            bound.gradients.show()
        current = {id(module) for module, _ in owners}
        if replaced or (bound.modules and current != {id(module) for module in bound.modules}):
            bound.uninstall()
            self._install(name, bound, owners)

    def _leaf(self, piece: Slice, parameter: nn.Parameter, bound: Bound) -> nn.Parameter:
        leaf = parameter if piece.dim is None else nn.Parameter(bound.home(piece))
        if piece.dim is not None and self.shows_gradients:
            bound.gradients.watch(leaf)
        record(leaf, piece.name not in self._untrained)
        if bound.memory is not None and self.residence is not None:
            self.residence.made(piece, leaf, bound.gradients if self.shows_gradients else None)
        return leaf

    def _install(self, name: str, bound: Bound, owners: Sequence[tuple[nn.Module, str]]) -> None:
        sliced = bound.sliced
        if sliced and name not in self._untrained:
            bound.record(True)
            bound.watch = self._watch(name, bound)
        bound.holders = holders_of(bound.forms(), owners)
        modules = {id(module): (module, attribute) for module, attribute in owners}
        for module, attribute in modules.values():
            operator = operator_for(module) if sliced else None
            # atomic, or its forward was replaced since: then the weight itself is watched
            if operator is None or attribute not in operator.names:
                self._guard.guard(module, self._follower(attribute, bound))
                continue

            def verify(
                owner: nn.Module, compiled: bool = False, bound: Bound = bound, attribute: str = attribute
            ) -> bool:
                if not bound.pairs:  # a wrapper kept this forward
                    return True
                if is_transformed():
                    return False
                weight = owner._parameters.get(attribute)
                if weight is not bound.parameter:
                    if attribute in owner._parameters and is_temporary(weight):
                        return False
                    self._verify()
                elif not bound.is_in_place():
                    self._verify()
                self._guard.check(owner)
                if (compiled or torch.is_grad_enabled()) and bound.has_hooks():
                    self.notices.hooks(name, compiled)
                    return False
                return True

            bound.modules.append(module)  # first: what may have been put must be taken out again
            put_forward(module, SlicedForward(module, operator, bound.pairs, verify, attribute))

    def _follower(self, attribute: str, bound: Bound) -> Callable[[nn.Module], None]:
        """What looks, before a module computes, whether it holds the same atomic parameter still."""

        def follow(module: nn.Module) -> None:
            parameter = module._parameters.get(attribute)
            if parameter is None or parameter is bound.parameter or not bound.pairs:
                return
            if not is_transformed() and not is_temporary(parameter):
                self._verify()

        return follow

    def _watch(self, name: str, bound: Bound) -> RemovableHandle:
        cut = cutter(self, name, bound)
        return bound.parameter.register_post_accumulate_grad_hook(cut)  # type: ignore[no-any-return, no-untyped-call]

    def _verify(self) -> None:
        verify = self._verify_weakly()
        if verify is not None:
            verify()
