"""Puts sliced operators into a model and takes them out again, without touching its class."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from chunkft.autograd import (
    Passes,
    Slice,
    disown,
    is_transformed,
    own,
    record,
    records,
    strip_forward,
    uncompilable,
)
from chunkft.bound import is_swapped
from chunkft.gathered import reshard
from chunkft.places import Places
from chunkft.plan import ParameterSpec, parameter_owners, parameter_specs, uncompiled
from chunkft.wiring import Residence, Wiring

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
)

# Weak on both sides: an attachment lives as long as its model.
_attachments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
        wiring: the leaves of the active slices, and what is in the model for them.
        on_replaced: weak reference to what is to be called once leaves were replaced, or None.
        lock: held while any of this changes; other threads may call the model.
    """

    def __init__(self, model: nn.Module, specs: list[ParameterSpec] | None = None) -> None:
        self.model = model
        self.specs: list[ParameterSpec] = parameter_specs(model) if specs is None else specs
        self.shares: list[Attachment] = []
        self.on_replaced: Callable[[], Callable[[], None] | None] | None = None
        self._places = Places(model, self.specs)
        self._passes = Passes(self)
        self._froze = False
        self.lock = threading.RLock()
        self._untrained: set[str] = set()
        self.wiring = Wiring(self._passes, self._untrained, weakref.WeakMethod(self.verify))
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for spec in self.specs:
            self._names[model.get_parameter(spec.name)] = spec.name

    def reside(self, residence: Residence) -> None:
        """The leaves of weights that stream, or are shards, are to be where this says."""
        self.wiring.residence = residence
        self._places = residence.places(self.specs) or self._places

    @property
    def device(self) -> torch.device:
        """Where the model computes, as far as its parameters tell."""
        residence = self.wiring.residence
        return next(iter(self.model.parameters())).device if residence is None else residence.device

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of this name; where it is sharded the shard, also while its module holds the whole.

        Raises:
            RuntimeError: if it is gone, or not what it was when the model was attached.
        """
        return self._places.current(name)

    def leaf_device(self, name: str) -> torch.device:
        """Where the leaves of a parameter are, or are going to be."""
        residence = self.wiring.residence
        if residence is not None and residence.streams(name):
            return residence.device_of(name)
        return self.model.get_parameter(name).device

    def on_host(self, name: str) -> bool:
        """Whether a parameter streams and its leaves are in host memory, where they are updated."""
        residence = self.wiring.residence
        return residence is not None and residence.streams(name) and not residence.on_device

    def sample(self, name: str) -> Tensor:
        """A tensor of the dtype of a parameter and on the device of its leaves, for those who ask no more of one."""
        parameter, device = self.parameter(name), self.leaf_device(name)
        residence = self.wiring.residence
        if residence is None or not residence.streams(name):
            return parameter
        return torch.empty(0, dtype=parameter.dtype, device=device)

    def hold(self, handles: Iterable[RemovableHandle]) -> None:
        """Take these hooks out again with our own, and out of copies of the model."""
        self._passes.hold(handles)

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

    def refresh(self) -> None:
        """Know what came into the model, or went, since it was attached."""
        for part in self.shares:
            part.verify()
        if self.in_use:
            return
        reshard(self.model)
        self.specs = parameter_specs(self.model)
        self._places = Places(self.model, self.specs)
        self._names = WeakTensorKeyDictionary()
        self.know()

    def know(self) -> None:
        """Remember which parameters there are, under their names, and that the model is this one's."""
        for spec in self.specs:
            parameter = self.model.get_parameter(spec.name)
            self._names[parameter] = spec.name
            _attachments[parameter] = weakref.ref(self._primary())

    @property
    def in_use(self) -> bool:
        """Whether some of its parameters are active."""
        return bool(self.wiring.bound)

    @property
    def is_attached(self) -> bool:
        """Whether this is an attachment of the model still."""
        present = self.model.__dict__.get("_chunkft")
        return present is self or (isinstance(present, Attachment) and self in present.shares)

    @property
    def called(self) -> bool:
        """Whether the model was called in grad mode since this was set to False."""
        return self._passes.called

    @called.setter
    def called(self, called: bool) -> None:
        self._passes.called = called

    @property
    def computes(self) -> bool:
        """Whether a forward pass of the model runs."""
        return self._passes.running

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
        self.wiring.set_trained(name, trained)

    def freeze(self) -> None:
        """Make every trainable parameter inactive."""
        self._froze = True
        for spec in self.specs:
            parameter = self._places.current(spec.name)
            own(parameter, self)
            self._places.record(spec.name, False)
            parameter.grad = None

    def unfreeze(self) -> None:
        """Make every parameter trainable again that was so before and was not frozen since."""
        if not self._froze:
            return
        self._froze = False
        # by object: a parameter may have another name by now (its layer was wrapped), or be out of the model
        for parameter, name in list(self._names.items()):  # type: ignore[no-untyped-call]
            disown(parameter)
            record(parameter, name not in self._untrained)

    def activate(self, slices: Iterable[Slice]) -> list[tuple[Slice, nn.Parameter]]:
        """Make these slices the active ones, in place of those that were active before.

        Returns:
            Pairs of a slice and its leaf, in the given order.

        Raises:
            RuntimeError: if a parameter is gone, or changed its shape or dtype since the model was attached;
                those that were active stay so.
        """
        with self.lock:
            return self._activate(list(slices))

    def _activate(self, wanted: list[Slice]) -> list[tuple[Slice, nn.Parameter]]:
        current = {name: self._places.current(name) for name in {piece.name for piece in wanted}}
        self._passes.watch(self.model)
        self.wiring.bind(wanted, current, parameter_owners(self.model))
        return self.active()

    def active(self) -> list[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and its leaf, in the order in which they were activated."""
        return self.wiring.active()

    def deactivate(self) -> None:
        """Freeze the active slices and give their modules their own forward back."""
        self._passes.remove()
        self.wiring.release()

    def verify(self) -> None:
        """Bind leaves anew whose weight was moved or replaced since they were made, and freeze the rest again.

        Raises:
            RuntimeError: if a parameter is gone, changed its shape or dtype, or is not shared any more and was.
        """
        with self.lock:
            if not self._places.are_as_noted(self.wiring.bound):
                self._follow()

    def _follow(self) -> None:
        before = self.wiring.generation
        self._places.forget()
        self._places.check_ties()
        owners = parameter_owners(self.model)
        for name in self._places.names:
            if name not in owners:
                self._places.current(name)
                raise RuntimeError(
                    f"parameter {name!r} is tied to another parameter now; detach() the optimizer, then build a new one"
                )
        current = {name: self._places.current(name) for name in self._places.names}
        self._exchange(current)
        for name, parameter in current.items():
            if name in self.wiring.bound:
                self.wiring.rebind(name, parameter, owners[name])
            elif records(parameter):
                self._places.record(name, False)
                parameter.grad = None
        self._places.note()
        follow = None if self.on_replaced is None else self.on_replaced()
        if follow is not None and self.wiring.generation != before:
            follow()

    def _exchange(self, current: dict[str, nn.Parameter]) -> None:
        """Take parameters in that came into the places of others, which are ordinary ones from then on."""
        before = {name: known for known, name in self._names.items()}  # type: ignore[no-untyped-call]
        came = {name: parameter for name, parameter in current.items() if before.get(name) is not parameter}
        trained = {
            name: self.is_trained(p) if self.name_of(p) is not None
            # what stands for the same weight has the flag that we gave to the one before
            else records(p) or (self._places.stands_for(name, p, None) and name not in self._untrained)
            for name, p in came.items()
        }  # fmt: skip
        stay = {id(parameter) for parameter in current.values()}
        for name in came:
            gone = before.get(name)
            if gone is not None and id(gone) not in stay:
                self._names.pop(gone)  # type: ignore[no-untyped-call]
                _attachments.pop(gone, None)  # type: ignore[no-untyped-call]
                disown(gone)
                record(gone, name not in self._untrained)
        for name, parameter in came.items():
            self._names[parameter] = name
            _attachments[parameter] = weakref.ref(self._primary())
            (self._untrained.discard if trained[name] else self._untrained.add)(name)
            own(parameter, self)

    @property
    def trains(self) -> bool:
        """Whether not all of its parameters are frozen."""
        return len(self._untrained) < len(self.specs)

    def before_forward(self) -> None:
        """Follow what was put in the place of parameters, which would get gradients otherwise."""
        with self.lock:
            same = self._places.hold_the_same(self.wiring.bound)
        if self.in_use and not same and not is_transformed() and not is_swapped():
            self.verify()

    def after_loading(self) -> None:
        """``load_state_dict`` is through: follow what it put in the place of parameters.

        What it untied may be tied again in the next line.
        """
        if self.in_use and self._places.are_tied:
            self.verify()

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
        self._places.forget()
        if self.wiring.residence is not None:
            self.wiring.residence.leave()

    def _primary(self) -> Attachment:
        present = self.model.__dict__.get("_chunkft")
        return present if isinstance(present, Attachment) and self in present.shares else self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is not attached: all of its parameters are trainable, without hooks of ours."""
        hooks = [key for part in (self, *self.shares) for key in part._hook_ids()]
        for module in self.model.modules():
            strip_forward(getattr(memo.get(id(module)), "__dict__", {}))
            for kind in _HOOKS:
                for key in hooks:
                    memo.get(id(module.__dict__[kind]), {}).pop(key, None)
        for spec in self.specs:
            copied_parameter = memo.get(id(self._places.current(spec.name)))
            if copied_parameter is not None:
                owner = next((part for part in self.shares if spec.name in part._places.names), self)
                if owner.in_use:
                    copied_parameter.requires_grad_(spec.name not in owner._untrained)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _hook_ids(self) -> list[int]:
        return self._passes.hook_ids() + self.wiring.hook_ids()


def attach(model: nn.Module) -> Attachment:
    """Register a model, so that an optimizer can be built from a list of its parameter groups.

    Args:
        model: a module with at least one trainable parameter.

    Returns:
        The attachment; if the model is attached already the same one, which knows of parameters that were replaced or
        added since. Nothing is frozen before an optimizer is built.

    Raises:
        TypeError: if ``model`` is not a module, or a scripted one.
        ValueError: if it has no trainable parameter, or shares one with another attached model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be a module of Python code, got a {type(model).__name__}: what is scripted or traced as a "
            "whole has no layers to cut; build the optimizer for the model that it was made from"
        )
    model = uncompiled(model)
    reshard(model)
    existing = model.__dict__.get("_chunkft")
    if isinstance(existing, Attachment) and existing.model is model:
        existing.refresh()
        return existing
    attachment = Attachment(model)
    for spec in attachment.specs:
        if attachment_of(model.get_parameter(spec.name)) is not None:
            raise ValueError(
                f"parameter {spec.name!r} belongs to another module that is attached, a part or a parent of this "
                "one or a model it is shared with; detach() that optimizer first"
            )
    model.__dict__["_chunkft"] = attachment
    attachment.know()
    return attachment


def attachment_of(parameter: Tensor) -> Attachment | None:
    """The attachment of the model that a parameter belongs to, or None."""
    reference = _attachments.get(parameter)  # type: ignore[no-untyped-call]
    return None if reference is None else reference()
