"""Puts sliced operators into a model and takes them out again, without touching its class."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from chunkft.autograd import Slice, SlicedForward, operator_for
from chunkft.plan import ParameterSpec, parameter_owners, parameter_specs

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


class Attachment:
    """A model whose trainable parameters are frozen except for the active slices.

    An active slice is a leaf ``nn.Parameter`` that shares memory with its weight, so that an in-place update of
    the leaf is the update of the model. The model's class, ``state_dict`` keys, ``named_parameters`` names and
    forward results stay as they are.

    Attributes:
        model: the module.
        specs: its trainable parameters at the time of attaching.
        generation: counts how often leaves were replaced by other objects, for those who keep references.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.specs: list[ParameterSpec] = parameter_specs(model)
        self.generation = 0
        self._expected = {
            spec.name: (spec.shape, model.get_parameter(spec.name).dtype) for spec in self.specs
        }
        self._bound: dict[str, _Bound] = {}
        self._order: list[Slice] = []
        self._hooks: list[RemovableHandle] = []
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

    def activate(self, slices: Iterable[Slice]) -> list[tuple[Slice, nn.Parameter]]:
        """Make these slices the active ones, in place of those that were active before.

        Returns:
            Pairs of a slice and its leaf, in the given order.

        Raises:
            RuntimeError: if a parameter is gone, or changed its shape or dtype since the model was attached.
        """
        wanted = list(slices)
        current = {name: self._current(name) for name in {piece.name for piece in wanted}}
        self.deactivate()
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
            bound.pairs.append((piece, leaf))
        for name, bound in self._bound.items():
            self._install(name, bound, owners[name])
        return self.active()

    def active(self) -> list[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and its leaf, in the order in which they were activated."""
        leaves = {piece: leaf for bound in self._bound.values() for piece, leaf in bound.pairs}
        return [(piece, leaves[piece]) for piece in self._order]

    def deactivate(self) -> None:
        """Freeze the active slices and give their modules their own forward back."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        for bound in self._bound.values():
            for module in bound.modules:
                if isinstance(module.__dict__.get("forward"), SlicedForward):
                    del module.__dict__["forward"]
            bound.parameter.requires_grad_(False)
            for _, leaf in bound.pairs:
                leaf.grad = None
        self._bound.clear()
        self._order = []

    def verify(self) -> None:
        """Bind leaves anew whose weight was moved or replaced since they were made.

        Raises:
            RuntimeError: if a parameter is gone, or changed its shape or dtype.
        """
        for name, bound in list(self._bound.items()):
            parameter = self._current(name)
            if parameter is not bound.parameter or parameter.data_ptr() != bound.address:
                self._rebind(name, bound, parameter)

    def detach(self) -> None:
        """Leave the model as it was found: every parameter trainable again, no trace of the attachment."""
        self.deactivate()
        for spec in self.specs:
            try:
                self.model.get_parameter(spec.name).requires_grad_(True)
            except AttributeError:
                continue  # removed by its owner since
        for parameter in list(self._names.keys()):  # type: ignore[no-untyped-call]
            _attachments.pop(parameter, None)  # type: ignore[no-untyped-call]
        self.model.__dict__.pop("_chunkft", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model is not attached

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _current(self, name: str) -> nn.Parameter:
        shape, dtype = self._expected[name]
        try:
            parameter = self.model.get_parameter(name)
        except AttributeError as error:
            raise RuntimeError(
                f"parameter {name!r} is no longer in the model; build a new optimizer"
            ) from error
        if tuple(parameter.shape) != shape:
            raise RuntimeError(
                f"parameter {name!r} had shape {shape} when the optimizer was built and has "
                f"{tuple(parameter.shape)} now; detach() the optimizer, then build a new one"
            )
        if parameter.dtype != dtype:
            raise RuntimeError(
                f"parameter {name!r} was {dtype} when the optimizer was built and is "
                f"{parameter.dtype} now; convert the model first, then build the optimizer"
            )
        return parameter

    def _install(self, name: str, bound: _Bound, owners: Sequence[tuple[nn.Module, str]]) -> None:
        sliced = bound.pairs[0][0].dim is not None
        modules = {id(module): module for module, _ in owners}
        for module in modules.values():
            if not sliced:
                self._hooks.append(module.register_forward_pre_hook(_refuse_lost_gradient))
                continue
            operator = operator_for(module)
            if operator is None:
                raise RuntimeError(
                    f"{type(module).__name__} that holds {name!r} has no sliced operator any more"
                )

            def verify(owner: nn.Module, bound: _Bound = bound, attribute: str = operator.weight) -> None:
                weight = owner._parameters[attribute]
                if weight is not bound.parameter or weight.data_ptr() != bound.address:
                    self.verify()
                if not torch.is_grad_enabled():
                    _refuse_lost_gradient(owner, ())

            module.__dict__["forward"] = SlicedForward(module, operator, bound.pairs, verify)
            bound.modules.append(module)

    def _rebind(self, name: str, bound: _Bound, parameter: nn.Parameter) -> None:
        replaced = parameter is not bound.parameter
        if replaced:
            self._names[parameter] = name
            _attachments[parameter] = weakref.ref(self)
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
            parameter.requires_grad_(False)
        bound.parameter, bound.address, bound.device = parameter, parameter.data_ptr(), parameter.device
        owners = parameter_owners(self.model)
        if name not in owners:
            raise RuntimeError(
                f"parameter {name!r} is tied to another parameter now; detach() the optimizer, then build a new one"
            )
        current = {id(module) for module, _ in owners[name]}
        if bound.modules and current != {id(module) for module in bound.modules}:
            for module in bound.modules:
                module.__dict__.pop("forward", None)
            bound.modules.clear()
            self._install(name, bound, owners[name])


def attach(model: nn.Module) -> Attachment:
    """Register a model, so that an optimizer can be built from a list of its parameter groups.

    Args:
        model: a module with at least one trainable parameter.

    Returns:
        The attachment; the same one if the model is attached already. Nothing is frozen before an optimizer is
        built.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if it has no trainable parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    existing = model.__dict__.get("_chunkft")
    if isinstance(existing, Attachment) and existing.model is model:
        return existing
    attachment = Attachment(model)
    model.__dict__["_chunkft"] = attachment
    for spec in attachment.specs:
        _attachments[model.get_parameter(spec.name)] = weakref.ref(attachment)
    return attachment


def attachment_of(parameter: Tensor) -> Attachment | None:
    """The attachment of the model that a parameter belongs to, or None."""
    reference = _attachments.get(parameter)  # type: ignore[no-untyped-call]
    return None if reference is None else reference()


def _refuse_lost_gradient(module: nn.Module, args: Any) -> None:
    """Raise if reentrant activation checkpointing is about to lose the gradients of this module.

    ``CheckpointFunction`` runs the forward pass without grad mode and, if none of its inputs requires grad,
    never comes back for the backward pass; with the parameters below frozen that is the usual case.
    """
    if torch.is_grad_enabled() or not module.training:
        return
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "forward"
            and code.co_filename.endswith("checkpoint.py")
            and "args" in frame.f_locals
        ):
            inputs = frame.f_locals["args"]
            if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in inputs):
                raise RuntimeError(
                    "reentrant activation checkpointing (use_reentrant=True) would lose the gradients of "
                    f"{type(module).__name__}: no input of the checkpointed block requires grad. Use "
                    "use_reentrant=False, or call model.enable_input_require_grads()"
                )
            return
        frame = frame.f_back  # type: ignore[assignment]
