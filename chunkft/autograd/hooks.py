"""What our hooks have in common: copies of a model do not call them, and compilers stay out of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch._dynamo.eval_frame import skip_code

HookClass = TypeVar("HookClass", bound=type)


class Hook:
    """A hook that survives pickling and copying of its module, but without its target: a copy is not attached."""

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def runs_as_it_is(hook: HookClass) -> HookClass:
    """Class decorator for hooks whose calls may be part of a larger trace, but are never a trace of their own.

    Where a compiler cannot trace a module's call as a whole it takes the functions in it one by one; in a trace of a
    hook alone ``torch.compiler.is_compiling()`` would tell it to do nothing.
    """
    skip_code(hook.__call__.__code__)
    return hook


def undisturbed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that no compiler is to look into, nor into what it calls."""
    watched = torch.compiler.is_compiling() or eval_frame.get_eval_frame_callback() is not None
    return _disabled(function, *args) if watched else function(*args)


skip_code(undisturbed.__code__)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _disabled(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
