"""Puts sliced operators into a model and takes them out again, without touching its class."""

from __future__ import annotations

import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
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
    disown,
    operator_for,
    own,
    put_forward,
    record,
    records,
    strip_forward,
    take_forward,
    uncompilable,
)
from chunkft.plan import ParameterSpec, parameter_owners, parameter_specs, uncompiled

_FUNCTIONAL = (os.path.join("nn", "utils", "stateless.py"), os.path.join("_functorch", "functional_call.py"))

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
)

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
    places: list[int] = field(default_factory=list)  # where the memory of each leaf was

    def __post_init__(self) -> None:
        self.gradients = SliceGradients(self)

    @property
    def sliced(self) -> bool:
        """Whether its leaves are parts of it; otherwise it is the leaf."""
        return self.pairs[0][0].dim is not None

    def note_places(self) -> None:
        """The leaves are where they belong now."""
        self.places = [leaf.data_ptr() for _, leaf in self.pairs]

    def is_in_place(self) -> bool:
        """Whether weight and leaves are where they were when the leaves were made."""
        if self.parameter.data_ptr() != self.address:
            return False
        return all(
            leaf.data_ptr() == place for (_, leaf), place in zip(self.pairs, self.places, strict=False)
        )

    def gather(self) -> None:
        """Take the values of leaves that were given other memory (``leaf.data = ...``) into the weight."""
        for number, (piece, leaf) in enumerate(self.pairs):
            if piece.dim is None or leaf.data_ptr() == self.places[number]:
                continue
            if tuple(leaf.shape) != piece.shape:
                raise RuntimeError(
                    f"the .data of the leaf of {piece} was set to a tensor of shape {tuple(leaf.shape)}; "
                    f"needs {piece.shape}"
                )
            home = piece.of(self.parameter.detach())
            home.copy_(leaf.detach())
            leaf.data = home

    def has_hooks(self) -> bool:
        """Whether somebody else watches the gradient of the weight."""
        ours = 0 if self.watch is None else 1
        after = self.parameter._post_accumulate_grad_hooks
        return bool(self.parameter._backward_hooks) or (after is not None and len(after) > ours)


class Attachment:
    """A model whose trainable parameters are frozen except for the active slices.

    An active slice is a leaf ``nn.Parameter`` that shares memory with its weight, so that an in-place update of
    the leaf is the update of the model. The model's class, ``state_dict`` keys, ``named_parameters`` names and
    forward results stay as they are.

    A module that reads the weight of another one without calling it (Mamba's ``dt_proj``, a functional output
    layer) still gets exact gradients: the weight of an active slice requires grad for such readers, and what
    arrives there is cut and added to the leaves at once. The same happens to a weight with hooks of others, which get
    the whole gradient as in dense training.

    Of several optimizers on one model each has a share: an attachment of its own, for its own parameters.

    Attributes:
        model: the module.
        specs: its trainable parameters at the time of attaching.
        shares: the attachments of optimizers that do not train all of them.
        called: whether the model was called in grad mode since somebody set this to False.
        generation: counts how often leaves were replaced by other objects, for those who keep references.
        after_weight: for names of sliced weights what is called once a backward pass is through with the weight itself.
        shows_gradients: whether ``weight.grad`` stands for the gradients of a weight's active slices, so that code
            which knows the weights only can clip and clear them; for slices that are made active from then on.
    """

    def __init__(self, model: nn.Module, specs: list[ParameterSpec] | None = None) -> None:
        self.model = model
        self.specs: list[ParameterSpec] = parameter_specs(model) if specs is None else specs
        self.shares: list[Attachment] = []
        self.generation = 0
        self.shows_gradients = False
        self.after_weight: dict[str, Callable[[], None]] = {}
        self._expected = {
            spec.name: (spec.shape, model.get_parameter(spec.name).dtype) for spec in self.specs
        }
        self._offloaded = {spec.name for spec in self.specs if model.get_parameter(spec.name).is_meta}
        self._bound: dict[str, _Bound] = {}
        self._order: list[Slice] = []
        self._places: list[tuple[str, dict[str, Any], str, nn.Parameter, tuple[int, ...], torch.dtype]] = []
        self._links: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._ties: list[tuple[dict[str, Any], str, str]] = []
        self._guard = ReentrantGuard()
        self._froze = False
        self._untrained: set[str] = set()
        self._tied: dict[str, list[tuple[nn.Module, str]]] = {}  # who held each parameter at first
        self._warned: set[tuple[str, str]] = set()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for spec in self.specs:
            self._names[model.get_parameter(spec.name)] = spec.name

    def hold(self, handles: Iterable[RemovableHandle]) -> None:
        """Take these hooks out again with our own, and out of copies of the model."""
        self._guard.hold(handles)

    def name_of(self, parameter: Tensor) -> str | None:
        """Name of a parameter that was trainable when the model was attached, or None."""
        name: str | None = self._names.get(parameter)  # type: ignore[no-untyped-call]
        return name

    def share(self, names: Collection[str]) -> Attachment:
        """An attachment of some of these parameters only; the others stay as they are.

        Raises:
            ValueError: names a parameter that another optimizer trains already.
        """
        taken = {spec.name for other in (self, *self.shares) if other.in_use for spec in other.specs}
        twice = next((name for name in names if name in taken), None)
        if twice is not None:
            raise ValueError(
                f"parameter {twice!r} is trained by another optimizer of chunkft already; detach() that one first, or "
                "give each optimizer parameters of its own"
            )
        chosen = [spec for spec in self.specs if spec.name in names]
        if len(chosen) == len(self.specs):
            return self
        part = Attachment(self.model, chosen)
        self.shares.append(part)
        return part

    @property
    def in_use(self) -> bool:
        """Whether some of its parameters are active."""
        return bool(self._order)

    @property
    def is_attached(self) -> bool:
        """Whether this is an attachment of the model still."""
        present = self.model.__dict__.get("_chunkft")
        return present is self or (isinstance(present, Attachment) and self in present.shares)

    @property
    def called(self) -> bool:
        """Whether the model was called in grad mode since this was set to False."""
        return self._guard.called

    @called.setter
    def called(self, called: bool) -> None:
        self._guard.called = called

    @property
    def computes(self) -> bool:
        """Whether a forward pass of the model runs."""
        return self._guard.running

    def is_trained(self, parameter: Tensor) -> bool:
        """Whether a parameter is trained when its turn comes; False after somebody froze it."""
        return self.name_of(parameter) not in self._untrained

    def set_trained(self, parameter: Tensor, trained: bool) -> None:
        """Freeze a parameter, active or not, or train it again; its optimizer state stays."""
        name = self.name_of(parameter)
        if name is None:
            record(parameter, trained)
            return
        (self._untrained.discard if trained else self._untrained.add)(name)
        bound = self._bound.get(name)
        if bound is not None:
            record(bound.parameter, trained)
            for _, leaf in bound.pairs:
                record(leaf, trained)
            if bound.sliced and trained and bound.watch is None:
                bound.watch = self._watch(name, bound)

    def freeze(self) -> None:
        """Make every trainable parameter inactive."""
        self._froze = True
        for spec in self.specs:
            parameter = self.model.get_parameter(spec.name)
            own(parameter, self)
            record(parameter, False)
            parameter.grad = None

    def unfreeze(self) -> None:
        """Make every parameter trainable again that was so before and was not frozen since."""
        if not self._froze:
            return
        self._froze = False
        for spec in self.specs:
            try:
                parameter = self.model.get_parameter(spec.name)
            except AttributeError:
                continue  # removed by its owner since
            disown(parameter)
            record(parameter, spec.name not in self._untrained)

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
            trained = piece.name not in self._untrained
            if piece.dim is None:
                leaf = parameter
                record(leaf, trained)
            else:
                leaf = nn.Parameter(piece.of(parameter.detach()))
                if self.shows_gradients:
                    bound.gradients.watch(leaf)
                record(leaf, trained)
            bound.pairs.append((piece, leaf))
            bound.note_places()
        for name, bound in self._bound.items():
            self._install(name, bound, owners[name])
        return self.active()

    def active(self) -> list[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and its leaf, in the order in which they were activated."""
        self.gather()
        for bound in self._bound.values():
            bound.gradients.settle()
        leaves = {piece: leaf for bound in self._bound.values() for piece, leaf in bound.pairs}
        return [(piece, leaves[piece]) for piece in self._order]

    def gather(self) -> None:
        """Take the values of leaves whose ``.data`` was replaced into their weights.

        Raises:
            RuntimeError: if they have another shape.
        """
        for bound in self._bound.values():
            if not bound.is_in_place() and bound.parameter.data_ptr() == bound.address:
                bound.gather()
                bound.note_places()

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
        taken = {id(bound.parameter) for bound in self._bound.values()}
        rest = (p for p in self.model.parameters() if not records(p) and id(p) not in taken)
        return next(((p, None) for p in rest), None)

    def backward_reaches(self, name: str) -> bool:
        """Whether the backward pass that runs comes to a sliced weight itself, at its end, beside its leaves.

        Before that, some reader of the weight may still need its values.
        """
        bound = self._bound.get(name)
        if bound is None or bound.watch is None:
            return False
        with torch.enable_grad():
            view: Any = bound.parameter.view_as(bound.parameter)
        return bool(torch._C._will_engine_execute_node(view.grad_fn.next_functions[0][0]))

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
            record(bound.parameter, False)
            for _, leaf in bound.pairs:
                leaf.grad = None
            bound.places.clear()
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
        self._places, self._links, self._ties = [], [], []
        owners = parameter_owners(self.model)
        for name in self._expected:
            if name not in owners:
                self._current(name)
                raise RuntimeError(
                    f"parameter {name!r} is tied to another parameter now; detach() the optimizer, then build a new one"
                )
            parameter = self._current(name)
            bound = self._bound.get(name)
            if self.name_of(parameter) is None:  # it was replaced
                self._names[parameter] = name
                _attachments[parameter] = weakref.ref(self._primary())
                if records(parameter):  # else it is trained if that was which it replaces
                    self._untrained.discard(name)
                own(parameter, self)
            if bound is None:
                if records(parameter):
                    record(parameter, False)
                    parameter.grad = None
            elif parameter is not bound.parameter or not bound.is_in_place():
                self._rebind(name, bound, parameter, owners[name])
        self._note_places(owners)

    def detach(self) -> None:
        """Leave the model as it was found: every parameter trainable again, no trace of the attachment.

        A share leaves its own parameters so, and the rest with the last optimizer of the model.
        """
        primary = self._primary()
        if primary is not self:
            self._leave()
            primary.shares.remove(self)
            if not primary.shares and not primary.in_use:
                primary.detach()
            return
        for part in self.shares:
            part._leave()
        self.shares = []
        self._leave()
        uncompilable(self.model)
        for parameter in list(self._names.keys()):  # type: ignore[no-untyped-call]
            _attachments.pop(parameter, None)  # type: ignore[no-untyped-call]
        self.model.__dict__.pop("_chunkft", None)

    def release(self) -> None:
        """Let go of an attachment that no optimizer was built on; the model stays attached."""
        primary = self._primary()
        self._leave()
        if primary is not self:
            primary.shares.remove(self)

    def _leave(self) -> None:
        self.deactivate()
        self.unfreeze()
        self._places, self._links, self._ties = [], [], []

    def _primary(self) -> Attachment:
        present = self.model.__dict__.get("_chunkft")
        return present if isinstance(present, Attachment) and self in present.shares else self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is not attached: all of its parameters are trainable, without hooks of ours."""
        hooks = [key for part in (self, *self.shares) for key in part._guard.hook_ids()]
        for module in self.model.modules():
            strip_forward(getattr(memo.get(id(module)), "__dict__", {}))
            for kind in _HOOKS:
                for key in hooks:
                    memo.get(id(module.__dict__[kind]), {}).pop(key, None)
        for spec in self.specs:
            copied_parameter = memo.get(id(self._current(spec.name)))
            if copied_parameter is not None:
                owner = next((part for part in self.shares if spec.name in part._expected), self)
                copied_parameter.requires_grad_(spec.name not in owner._untrained)
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

    def _note_places(self, owners: Mapping[str, Sequence[tuple[nn.Module, str]]]) -> None:
        """Remember where every parameter is, so that the next look finds out by identity alone."""
        if not self._tied:  # the first look: nobody can have untied what was tied when the model was attached
            for name in self._expected:
                holders = [
                    holder
                    for holder in owners[name]
                    if holder[0]._parameters.get(holder[1]) is self._current(name)
                ]
                self._tied[name] = holders
        self._ties = [
            (module._parameters, attribute, name)
            for name, holders in self._tied.items()
            for module, attribute in (holders if len(holders) > 1 else ())
        ]
        for parameters, attribute, name in self._ties:
            if parameters.get(attribute) is not self._current(name):
                self._places = []
                raise RuntimeError(
                    f"parameter {name!r} was shared with a parameter {attribute!r} of another module when the "
                    "optimizer was built and is not any more, as after load_state_dict(assign=True); tie them again "
                    "(model.tie_weights() in transformers), or detach() the optimizer and build a new one"
                )
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
            if name not in self._bound and records(parameter):
                return False
        for parameters, attribute, name in self._ties:
            if name in self._bound and parameters.get(attribute) is not self._bound[name].parameter:
                return False
        return all(bound.is_in_place() for bound in self._bound.values())

    def _install(self, name: str, bound: _Bound, owners: Sequence[tuple[nn.Module, str]]) -> None:
        sliced = bound.sliced
        if sliced and name not in self._untrained:
            record(bound.parameter, True)
            bound.watch = self._watch(name, bound)
        modules = {id(module): (module, attribute) for module, attribute in owners}
        for module, attribute in modules.values():
            operator = operator_for(module) if sliced else None
            if (
                operator is None
            ):  # atomic, or its forward was replaced since: then the weight itself is watched
                self._guard.guard(module)
                continue

            def verify(owner: nn.Module, bound: _Bound = bound, attribute: str = attribute) -> bool:
                weight: Any = owner._parameters[attribute]
                if not bound.pairs:  # a wrapper kept this forward
                    return True
                if weight is not bound.parameter:
                    if _is_temporary(weight):
                        return False
                    self.verify()
                elif not bound.is_in_place():
                    self.verify()
                self._guard.check(owner)
                if bound.has_hooks():
                    self._warn_hooks(name)
                    return False
                return True

            bound.modules.append(module)  # first: what may have been put must be taken out again
            put_forward(module, SlicedForward(module, operator, bound.pairs, verify, attribute))

    def _watch(self, name: str, bound: _Bound) -> RemovableHandle:
        cut = self._cutter(name, bound)
        return bound.parameter.register_post_accumulate_grad_hook(cut)  # type: ignore[no-any-return, no-untyped-call]

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
            # Calls of the module end here too, with nothing for the weight itself.
            if active.gradients.take_arrival() and not active.has_hooks():
                owner._warn_reader(name)
            if name in owner.after_weight:
                owner.after_weight[name]()

        return cut

    def _warn_hooks(self, name: str) -> None:
        pattern = _pattern(name)
        if (pattern, "hooks") not in self._warned:
            self._warned.add((pattern, "hooks"))
            warnings.warn(
                f"the weight {name!r} has a hook on its gradient, so its whole gradient is computed, handed to the "
                "hook, and its active slice cut out: exact, but without the savings",
                stacklevel=4,
            )

    def _warn_reader(self, name: str) -> None:
        pattern = _pattern(name)
        if (pattern, "reader") not in self._warned:
            self._warned.add((pattern, "reader"))
            warnings.warn(
                f"the weight {name!r} is used without a call of the module that holds it, so its whole gradient is "
                "computed before its active slice is cut out: exact, but without the savings. "
                f"chunkft.partition(..., atomic={pattern!r}) counts its gradient as a whole",
                stacklevel=2,
            )

    def _rebind(
        self, name: str, bound: _Bound, parameter: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]
    ) -> None:
        replaced = parameter is not bound.parameter
        bound.gradients.settle()
        if not replaced and parameter.data_ptr() == bound.address:
            bound.gather()
            bound.note_places()
            return
        for i, (piece, leaf) in enumerate(bound.pairs):
            if piece.dim is None:
                if replaced:
                    record(parameter, name not in self._untrained)
                    bound.pairs[i] = (piece, parameter)
                    self.generation += 1
                continue
            grad, leaf.grad = leaf.grad, None
            leaf.data = piece.of(parameter.detach())
            record(leaf, name not in self._untrained)
            if grad is not None:
                leaf.grad = grad.to(parameter.device)
        bound.gradients.hide()
        if replaced:
            record(bound.parameter, False)
            _uninstall(bound)
        bound.parameter, bound.address, bound.device = parameter, parameter.data_ptr(), parameter.device
        bound.note_places()
        if self.shows_gradients:
            bound.gradients.show()
        current = {id(module) for module, _ in owners}
        if replaced or (bound.modules and current != {id(module) for module in bound.modules}):
            _uninstall(bound)
            self._install(name, bound, owners)


def _pattern(name: str) -> str:
    """The name with a star in place of each number, which stands for all layers."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", name)


def _is_temporary(weight: Tensor | None) -> bool:
    """Whether what a module holds in place of its weight is there for one call only, and not to be trained.

    ``torch.func.functional_call`` puts tensors, or parameters of another model, there and takes them out again. Where
    nothing is recorded nothing is trained, so that a replacement may wait for its first forward pass in grad mode.
    """
    if not isinstance(weight, nn.Parameter) or not torch.is_grad_enabled():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_FUNCTIONAL):
            return True
        frame = frame.f_back
    return False


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
