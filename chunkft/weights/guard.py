"""What ``model.to()`` and its kin do to a model whose weights stream: these stay in their pages, the rest moves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.attach import attachment_of
from chunkft.autograd import Hook


class StreamedApply(Hook):
    """``module._apply`` of a module that holds weights that stream; set on the instance.

    Its target is the module, the names of those weights in it, and the device that they stream to. A copy of the module
    moves as a whole.
    """

    def __init__(self, target: tuple[nn.Module, Collection[str], torch.device] | None = None) -> None:
        super().__init__(target)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        assert self.target is not None
        module, names, _ = self.target
        # before anything is moved
        for path, child in module.named_modules():
            other = child.__dict__.get("_apply")
            if isinstance(other, StreamedApply) and other.target is not None and other.target[0] is child:
                other.check(path, fn)
        held = module._parameters
        away = {name: held[name] for name in names if name in held}
        order = list(held)
        for name in away:
            del held[name]
        try:
            return type(module)._apply(module, fn, recurse)
        finally:
            rest = dict(held)
            held.clear()
            held.update({name: away[name] if name in away else rest[name] for name in order})

    def check(self, path: str, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise RuntimeError if a conversion is not possible."""
        assert self.target is not None
        module, names, device = self.target
        for name in sorted(names):
            parameter = module._parameters.get(name)
            if parameter is not None:
                check(f"{path}.{name}" if path else name, parameter, device, fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        assert self.target is not None
        copied = memo[id(self.target[0])]
        return type(copied)._apply.__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.target is not None
        return _plain_apply, (self.target[0],)


def _plain_apply(module: nn.Module) -> Any:
    return type(module)._apply.__get__(module)


class Saving(Hook):
    """Before ``state_dict``: host memory has the newest values. Its target is a weak reference to the stream."""

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        stream = None if self.target is None else self.target()
        if stream is not None:
            stream.catch_up()


class Loading(Hook):
    """Before ``load_state_dict``. Its target is a weak reference to the stream."""

    def __call__(
        self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *_: Any
    ) -> None:
        stream = None if self.target is None else self.target()
        if stream is not None and local_metadata.get("assign_to_params_buffers", False):
            raise RuntimeError(
                "load_state_dict(assign=True) would put other memory in the place of weights that stream; load without "
                "assign, which copies the values into their pages"
            )


def streams_in_part(model: nn.Module) -> bool:
    """Whether weights of a module stream, by a stream of its own, of a part of it, or of what it is a part of."""
    return any(isinstance(module.__dict__.get("_apply"), StreamedApply) for module in model.modules())


def check_free(model: nn.Module) -> None:
    """Raise ValueError if weights of a model stream, or those of a part of it, or of a module that it is a part of, or
    if an optimizer trains them.
    """
    if any(isinstance(module.__dict__.get("_apply"), StreamedApply) for module in model.modules()):
        raise ValueError(
            "the weights of this model, or of a part of it, stream already; detach() that stream first"
        )
    for name, parameter in model.named_parameters():
        attachment = attachment_of(parameter)
        if attachment is not None and (attachment.in_use or any(part.in_use for part in attachment.shares)):
            raise ValueError(
                f"parameter {name!r} is trained by an optimizer of chunkft, for weights that stay where they are; "
                "detach() it first, or build it with weights='stream'"
            )


def check(name: str, parameter: Tensor, device: torch.device, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise RuntimeError if a conversion is one of dtype, or to another device than that of the computation."""
    sample = fn(torch.empty(0, dtype=parameter.dtype, device=device))
    if sample.dtype != parameter.dtype:
        raise RuntimeError(
            f"the weight {name!r} streams and cannot be converted from {parameter.dtype} to {sample.dtype} in place; "
            "convert the model first, then let its weights stream"
        )
    if sample.device != device:
        raise RuntimeError(
            f"the weight {name!r} streams to {device}, so the model cannot be moved to {sample.device}; detach() the "
            "optimizer (or the stream) first"
        )
