"""Puts sliced operators into a model and takes them out again, without touching its class."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from chunkft.autograd import (
    ReentrantGuard,
    Slice,
    SlicedForward,
    SliceGradients,
    operator_for,
    put_forward,
    strip_forward,
    take_forward,
    uncompilable,
)
from chunkft.plan import ParameterSpec, parameter_owners, parameter_specs, uncompiled

# Weak on both sides: an attachment lives as long as its model.
_attachments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass
class _Bound:
    """One parameter with active slices, and where its memory was when they were made."""

    parameter: Tensor
    address: int
    device: torch.device
    pairs: list[tuple[Slice, nn.Parameter]]
    modules: list[nn.Module] = field(default_factory=list)
    watch: RemovableHandle | None = None

    def __post_init__(self) -> None:
        self.gradients = SliceGradients(self)


class Attachment:
    """A model whose trainable parameters are frozen except for the active slices.

    An active slice is a leaf ``nn.Parameter`` that shares memory with its weight, so that an in-place update of
    the leaf is the update of the model. The model's class, ``state_dict`` keys, ``named_parameters`` names and
    forward results stay as they are.

    A module that reads the weight of another one without calling it (Mamba's ``dt_proj``, a functional output
    layer) still gets exact gradients: the weight of an active slice requires grad for such readers, and what
    arrives there is cut and added to the leaves at once.

    Attributes:
        model: the module.
        specs: its trainable parameters at the time of attaching.
        generation: counts how often leaves were replaced by other objects, for those who keep references.
        shows_gradients: whether ``weight.grad`` stands for the gradients of a weight's active slices, so that code
            which knows the weights only can clip and clear them; for slices that are made active from then on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.specs: list[ParameterSpec] = parameter_specs(model)
        self.generation = 0
        self.shows_gradients = False
        self._expected = {
            spec.name: (spec.shape, model.get_parameter(spec.name).dtype) for spec in self.specs
        }
        self._offloaded = {spec.name for spec in self.specs if model.get_parameter(spec.name).is_meta}
        self._bound: dict[str, _Bound] = {}
        self._order: list[Slice] = []
        self._places: list[tuple[str, dict[str, Any], str, nn.Parameter, tuple[int, ...], torch.dtype]] = []
        self._links: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._guard = ReentrantGuard()
        self._warned: set[str] = set()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for spec in self.specs:
            self._names[model.get_parameter(spec.name)] = spec.name

    def name_of(self, parameter: Tensor) -> str | None:
        """Name of a parameter that was trainable when the model was attached, or None."""
        name: str | None = self._names.get(parameter)  # type: ignore[no-untyped-call]
        return name

    def freeze(self) -> None:
        """Make every trainable parameter inactive."""
        for spec in self.specs:
            parameter = self.model.get_parameter(spec.name)
            parameter.requires_grad_(False)
            parameter.grad = None

    def unfreeze(self) -> None:
        """Make every parameter trainable again that was so before."""
        for spec in self.specs:
            try:
                self.model.get_parameter(spec.name).requires_grad_(True)
            except AttributeError:
                continue  # removed by its owner since

    def activate(self, slices: Iterable[Slice]) -> list[tuple[Slice, nn.Parameter]]:
        """Make these slices the active ones, in place of those that were active before.

        Returns:
            Pairs of a slice and its leaf, in the given order.

        Raises:
            RuntimeError: if a parameter is gone, or changed its shape or dtype since the model was attached;
                those that were active stay so.
        """
        wanted = list(slices)
        current = {name: self._current(name) for name in {piece.name for piece in wanted}}
        self._let_go()
        self._guard.watch(self.model)
        self._order = wanted
        owners = parameter_owners(self.model)
        for piece in wanted:
            parameter = current[piece.name]
            bound = self._bound.get(piece.name)
            if bound is None:
                bound = _Bound(parameter, parameter.data_ptr(), parameter.device, [])
                self._bound[piece.name] = bound
            if piece.dim is None:
                leaf = parameter
                leaf.requires_grad_(True)
            else:
                leaf = nn.Parameter(piece.of(parameter.detach()))
                if self.shows_gradients:
                    bound.gradients.watch(leaf)
            bound.pairs.append((piece, leaf))
        for name, bound in self._bound.items():
            self._install(name, bound, owners[name])
        return self.active()

    def active(self) -> list[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and its leaf, in the order in which they were activated."""
        for bound in self._bound.values():
            bound.gradients.settle()
        leaves = {piece: leaf for bound in self._bound.values() for piece, leaf in bound.pairs}
        return [(piece, leaves[piece]) for piece in self._order]

    def show_gradients(self) -> None:
        """Let ``weight.grad`` stand for gradients of slices that did not come from a backward pass."""
        for bound in self._bound.values():
            if self.shows_gradients:
                bound.gradients.show()

    def carrier(self) -> tuple[Tensor, SliceGradients | None] | None:
        """A weight whose ``.grad`` is not in use, and the gradients of its slices if some are active; None if there
        is none.
        """
        for bound in self._bound.values():
            if bound.pairs[0][0].dim is not None:
                return bound.parameter, bound.gradients
        return next(((p, None) for p in self.model.parameters() if not p.requires_grad), None)

    def hide_gradients(self) -> None:
        """Set the ``weight.grad`` that stand for gradients of slices to None."""
        for bound in self._bound.values():
            bound.gradients.hide()

    def deactivate(self) -> None:
        """Freeze the active slices and give their modules their own forward back."""
        self._guard.remove()
        self._let_go()

    def _let_go(self) -> None:
        self._guard.release()
        for bound in self._bound.values():
            _uninstall(bound)
            bound.gradients.hide()
            bound.parameter.requires_grad_(False)
            for _, leaf in bound.pairs:
                leaf.grad = None
            bound.pairs.clear()  # a wrapper may have kept the sliced forward: from now on it is the plain one
        self._bound.clear()
        self._order = []

    def verify(self) -> None:
        """Bind leaves anew whose weight was moved or replaced since they were made, and freeze the rest again.

        Raises:
            RuntimeError: if a parameter is gone, or changed its shape or dtype.
        """
        if self._places and self._is_as_seen():
            return
        self._places, self._links = [], []
        for name in self._expected:
            parameter = self._current(name)
            bound = self._bound.get(name)
            if bound is None:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    parameter.grad = None
            elif parameter is not bound.parameter or parameter.data_ptr() != bound.address:
                self._rebind(name, bound, parameter)
        self._note_places()

    def detach(self) -> None:
        """Leave the model as it was found: every parameter trainable again, no trace of the attachment."""
        self.deactivate()
        uncompilable(self.model)
        self.unfreeze()
        self._places, self._links = [], []
        for parameter in list(self._names.keys()):  # type: ignore[no-untyped-call]
            _attachments.pop(parameter, None)  # type: ignore[no-untyped-call]
        self.model.__dict__.pop("_chunkft", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is not attached: all of its parameters are trainable, without hooks of ours."""
        hooks = self._guard.hook_ids()
        for module in self.model.modules():
            strip_forward(getattr(memo.get(id(module)), "__dict__", {}))
            for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
                for key in hooks:
                    memo.get(id(module.__dict__[kind]), {}).pop(key, None)
        for spec in self.specs:
            copied_parameter = memo.get(id(self._current(spec.name)))
            if copied_parameter is not None:
                copied_parameter.requires_grad_(True)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _current(self, name: str) -> nn.Parameter:
        shape, dtype = self._expected[name]
        *path, attribute = name.split(".")
        module: nn.Module | None = self.model
        for part in path:  # get_parameter() takes ten times as long
            module = None if module is None else module._modules.get(part)
        parameter = None if module is None else module._parameters.get(attribute)
        if parameter is None:
            raise RuntimeError(f"parameter {name!r} is no longer in the model; build a new optimizer")
        if tuple(parameter.shape) != shape:
            raise RuntimeError(
                f"parameter {name!r} had shape {shape} when the optimizer was built and has "
                f"{tuple(parameter.shape)} now; detach() the optimizer, then build a new one"
            )
        if parameter.is_meta and name not in self._offloaded:
            raise RuntimeError(
                f"parameter {name!r} is on device 'meta' now: its values were offloaded after the optimizer was built. "
                "Use a device_map without offloading for what is trained"
            )
        if parameter.dtype != dtype:
            raise RuntimeError(
                f"parameter {name!r} was {dtype} when the optimizer was built and is "
                f"{parameter.dtype} now; convert the model first, then build the optimizer"
            )
        return parameter

    def _note_places(self) -> None:
        """Remember where every parameter is, so that the next look finds out by identity alone."""
        links: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        for name, (shape, dtype) in self._expected.items():
            *path, attribute = name.split(".")
            module = self.model
            for part in path:
                child = module._modules[part]
                assert child is not None
                links[id(module), part] = (module._modules, part, child)
                module = child
            self._places.append((name, module._parameters, attribute, self._current(name), shape, dtype))
        self._links = list(links.values())

    def _is_as_seen(self) -> bool:
        """Whether nothing that ``verify`` looks for happened since ``_note_places``; it runs in every step."""
        for children, part, child in self._links:
            if children.get(part) is not child:
                return False
        for name, parameters, attribute, seen, shape, dtype in self._places:
            parameter = parameters.get(attribute)
            if parameter is not seen or parameter.shape != shape or parameter.dtype is not dtype:
                return False
            if parameter.requires_grad and name not in self._bound:
                return False
        return all(bound.parameter.data_ptr() == bound.address for bound in self._bound.values())

    def _install(self, name: str, bound: _Bound, owners: Sequence[tuple[nn.Module, str]]) -> None:
        sliced = bound.pairs[0][0].dim is not None
        if sliced:
            bound.parameter.requires_grad_(True)
            bound.watch = bound.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._cutter(name, bound)
            )
        modules = {id(module): (module, attribute) for module, attribute in owners}
        for module, attribute in modules.values():
            operator = operator_for(module) if sliced else None
            if (
                operator is None
            ):  # atomic, or its forward was replaced since: then the weight itself is watched
                self._guard.guard(module)
                continue

            def verify(owner: nn.Module, bound: _Bound = bound, attribute: str = attribute) -> None:
                weight = owner._parameters[attribute]
                if weight is not bound.parameter or weight.data_ptr() != bound.address:
                    self.verify()
                self._guard.check(owner)

            put_forward(module, SlicedForward(module, operator, bound.pairs, verify, attribute))
            bound.modules.append(module)

    def _cutter(self, name: str, bound: _Bound) -> Callable[[Tensor], None]:
        """Hook that hands the gradient of a whole weight, from who read it without its module, to the leaves."""
        # The hook lives in C++, out of sight of the garbage collector: it must not hold us.
        attachment, target = weakref.ref(self), weakref.ref(bound)

        def cut(parameter: Tensor) -> None:
            owner, active = attachment(), target()
            if owner is None or active is None:
                parameter.grad = None
                return
            active.gradients.settle()
            if owner.shows_gradients:
                active.gradients.show()
            owner._warn_reader(name)

        return cut

    def _warn_reader(self, name: str) -> None:
        pattern = re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", name)
        if pattern not in self._warned:
            self._warned.add(pattern)
            warnings.warn(
                f"the weight {name!r} is used without a call of the module that holds it, so its whole gradient is "
                "computed before its active slice is cut out: exact, but without the savings. "
                f"chunkft.partition(..., atomic={pattern!r}) counts its gradient as a whole",
                stacklevel=2,
            )

    def _rebind(self, name: str, bound: _Bound, parameter: nn.Parameter) -> None:
        replaced = parameter is not bound.parameter
        bound.gradients.settle()
        owners = parameter_owners(self.model)
        if name not in owners:
            raise RuntimeError(
                f"parameter {name!r} is tied to another parameter now; detach() the optimizer, then build a new one"
            )
        for i, (piece, leaf) in enumerate(bound.pairs):
            if piece.dim is None:
                if replaced:
                    parameter.requires_grad_(True)
                    bound.pairs[i] = (piece, parameter)
                    self.generation += 1
                continue
            grad, leaf.grad = leaf.grad, None
            leaf.data = piece.of(parameter.detach())
            if grad is not None:
                leaf.grad = grad.to(parameter.device)
        bound.gradients.hide()
        if replaced:
            self._names[parameter] = name
            _attachments[parameter] = weakref.ref(self)
            bound.parameter.requires_grad_(False)
            _uninstall(bound)
        bound.parameter, bound.address, bound.device = parameter, parameter.data_ptr(), parameter.device
        if self.shows_gradients:
            bound.gradients.show()
        current = {id(module) for module, _ in owners[name]}
        if replaced or (bound.modules and current != {id(module) for module in bound.modules}):
            _uninstall(bound)
            self._install(name, bound, owners[name])


def _uninstall(bound: _Bound) -> None:
    for module in bound.modules:
        take_forward(module, bound.pairs)
    bound.modules.clear()
    if bound.watch is not None:
        bound.watch.remove()
        bound.watch = None


def attach(model: nn.Module) -> Attachment:
    """Register a model, so that an optimizer can be built from a list of its parameter groups.

    Args:
        model: a module with at least one trainable parameter.

    Returns:
        The attachment; the same one if the model is attached already. Nothing is frozen before an optimizer is
        built.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if it has no trainable parameter, or shares one with another attached model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    existing = model.__dict__.get("_chunkft")
    if isinstance(existing, Attachment) and existing.model is model:
        return existing
    attachment = Attachment(model)
    for spec in attachment.specs:
        if attachment_of(model.get_parameter(spec.name)) is not None:
            raise ValueError(
                f"parameter {spec.name!r} belongs to another module that is attached, a part or a parent of this "
                "one or a model it is shared with; detach() that optimizer first"
            )
    model.__dict__["_chunkft"] = attachment
    for spec in attachment.specs:
        _attachments[model.get_parameter(spec.name)] = weakref.ref(attachment)
    return attachment


def attachment_of(parameter: Tensor) -> Attachment | None:
    """The attachment of the model that a parameter belongs to, or None."""
    reference = _attachments.get(parameter)  # type: ignore[no-untyped-call]
    return None if reference is None else reference()
