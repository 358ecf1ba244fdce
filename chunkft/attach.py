"""Puts sliced operators into a model and takes them out again, without touching its class."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from chunkft.autograd import (
    Passes,
    ReentrantGuard,
    Slice,
    SlicedForward,
    SliceGradients,
    disown,
    is_transformed,
    operator_for,
    own,
    put_forward,
    record,
    records,
    strip_forward,
    uncompilable,
)
from chunkft.bound import Bound, is_swapped, is_temporary
from chunkft.places import Places, holders_of
from chunkft.plan import ParameterSpec, parameter_owners, parameter_specs, uncompiled
from chunkft.readers import Notices, cutter

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
        generation: counts how often leaves were replaced by other objects, for those who keep references.
        on_replaced: weak reference to what is to be called once leaves were replaced, or None.
        notices: what its users are told once.
        after_weight: for names of sliced weights what is called once a backward pass is through with the weight itself.
        shows_gradients: whether ``weight.grad`` stands for the gradients of a weight's active slices, so that code
            which knows the weights only can clip and clear them; for slices that are made active from then on.
    """

    def __init__(self, model: nn.Module, specs: list[ParameterSpec] | None = None) -> None:
        self.model = model
        self.specs: list[ParameterSpec] = parameter_specs(model) if specs is None else specs
        self.shares: list[Attachment] = []
        self.generation = 0
        self.on_replaced: Callable[[], Callable[[], None] | None] | None = None
        self.shows_gradients = False
        self.after_weight: dict[str, Callable[[], None]] = {}
        self.notices = Notices()
        self._places = Places(model, self.specs)
        self._bound: dict[str, Bound] = {}
        self._order: list[Slice] = []
        self._passes = Passes(self)
        self._guard = ReentrantGuard(self._passes)
        self._froze = False
        self.lock = threading.RLock()  # other threads may call the model
        self._untrained: set[str] = set()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for spec in self.specs:
            self._names[model.get_parameter(spec.name)] = spec.name

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
        return bool(self._order)

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
        self._let_go()
        self._passes.watch(self.model)
        self._order = wanted
        owners = parameter_owners(self.model)
        for piece in wanted:
            parameter = current[piece.name]
            bound = self._bound.get(piece.name)
            if bound is None:
                if piece.dim is not None:
                    parameter.grad = None  # from before its turn
                bound = Bound(parameter, parameter.data_ptr(), [])
                self._bound[piece.name] = bound
            bound.pairs.append((piece, self._leaf(piece, parameter, bound)))
            bound.note_places()
        for name, bound in self._bound.items():
            self._install(name, bound, owners[name])
        return self.active()

    def active(self) -> list[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and its leaf, in the order in which they were activated."""
        for bound in self._bound.values():
            if bound.sliced:
                bound.gradients.follow(self.shows_gradients)
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

    def holds_active(self) -> bool:
        """Whether the model holds the weights with active slices still, where they were."""
        with DisableTorchFunctionSubclass():  # which every look at a parameter of a class of its own asks for
            for bound in self._bound.values():
                if not (bound.is_held() and bound.is_in_place()):
                    return False
        return True

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
        self._passes.remove()
        self._let_go()

    def _let_go(self) -> None:
        self._guard.release()
        for bound in self._bound.values():
            bound.uninstall()
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
            RuntimeError: if a parameter is gone, changed its shape or dtype, or is not shared any more and was.
        """
        with self.lock:
            if not self._places.are_as_noted(self._bound):
                self._follow()

    def _follow(self) -> None:
        before = self.generation
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
            bound = self._bound.get(name)
            if bound is None:
                if records(parameter):
                    record(parameter, False)
                    parameter.grad = None
            elif parameter is not bound.parameter or not bound.is_in_place():
                self._rebind(name, bound, parameter, owners[name])
        self._places.note()
        follow = None if self.on_replaced is None else self.on_replaced()
        if follow is not None and self.generation != before:
            follow()

    def _exchange(self, current: dict[str, nn.Parameter]) -> None:
        """Take parameters in that came into the places of others, which are ordinary ones from then on."""
        before = {name: known for known, name in self._names.items()}  # type: ignore[no-untyped-call]
        came = {name: parameter for name, parameter in current.items() if before.get(name) is not parameter}
        trained = {
            name: self.is_trained(p) if self.name_of(p) is not None else records(p)
            for name, p in came.items()
        }
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
            same = self._places.hold_the_same(self._bound)
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
        return self._passes.hook_ids() + self._guard.hook_ids()

    def _leaf(self, piece: Slice, parameter: nn.Parameter, bound: Bound) -> nn.Parameter:
        leaf = parameter if piece.dim is None else nn.Parameter(piece.of(parameter.detach()))
        if piece.dim is not None and self.shows_gradients:
            bound.gradients.watch(leaf)
        record(leaf, piece.name not in self._untrained)
        return leaf

    def _install(self, name: str, bound: Bound, owners: Sequence[tuple[nn.Module, str]]) -> None:
        sliced = bound.sliced
        if sliced and name not in self._untrained:
            record(bound.parameter, True)
            bound.watch = self._watch(name, bound)
        bound.holders = holders_of(bound.parameter, owners)
        modules = {id(module): (module, attribute) for module, attribute in owners}
        for module, attribute in modules.values():
            operator = operator_for(module) if sliced else None
            if (
                operator is None
            ):  # atomic, or its forward was replaced since: then the weight itself is watched
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
                    self.verify()
                elif not bound.is_in_place():
                    self.verify()
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
                self.verify()

        return follow

    def _watch(self, name: str, bound: Bound) -> RemovableHandle:
        cut = cutter(self, name, bound)
        return bound.parameter.register_post_accumulate_grad_hook(cut)  # type: ignore[no-any-return, no-untyped-call]

    def _rebind(
        self, name: str, bound: Bound, parameter: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]
    ) -> None:
        replaced = parameter is not bound.parameter
        bound.gradients.settle()
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
