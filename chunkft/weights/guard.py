"""What ``model.to()`` and its kin do to a model whose weights stream: these stay in their pages, the rest moves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

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
        module, names, device = self.target
        held = module._parameters
        away = {name: held[name] for name in names if name in held}
        for name, parameter in away.items():
            if parameter is not None:
                check(name, parameter, device, fn)
        order = list(held)
        for name in away:
            del held[name]
        try:
            return type(module)._apply(module, fn, recurse)
        finally:
            rest = dict(held)
            held.clear()
            held.update({name: away[name] if name in away else rest[name] for name in order})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        assert self.target is not None
        copied = memo[id(self.target[0])]
        return type(copied)._apply.__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.target is not None
        return _plain_apply, (self.target[0],)


def _plain_apply(module: nn.Module) -> Any:
    return type(module)._apply.__get__(module)


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
