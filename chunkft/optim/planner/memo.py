"""Results that an object keeps for as long as it lives, and not longer: the models that are planned for are large."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

__all__ = ["remembered"]


def remembered(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """``functools.cache`` of a method, in the object itself; of positional arguments."""
    name = f"_remembered_{method.__name__}"

    @functools.wraps(method)
    def wrapper(owner: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        found: dict[tuple[Hashable, ...], Any] = owner.__dict__.setdefault(name, {})
        if args not in found:
            found[args] = method(owner, *args, **kwargs)
        result: Result = found[args]
        return result

    return wrapper
