"""Hyper-parameters that a base optimizer changes by itself, where a step consists of several updates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chunkft.optim.rule import Groups

MISSING = object()


@dataclass
class _Change:
    """What was in a group before an update, and what the base made of it."""

    before: Any
    after: Any
    in_place: bool = False


class AdvancedValues:
    """Lets every update of a step start from the same group values, and shows what they became when all are done.

    Some optimizers count steps in their groups. Only what the base itself changed is written, and only where nobody
    else changed it since: a learning rate that is set between two updates of a step stands.

    Args:
        groups: the groups whose values the base shares.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._changes: dict[int, dict[str, _Change]] = {}

    @contextmanager
    def held_back(self, numbers: set[int]) -> Iterator[None]:
        """Take back, at the end, what happens to the values of these groups inside."""
        before = {number: _values(self._groups[number]) for number in numbers}
        versions = {number: _versions(self._groups[number]) for number in numbers}
        kept = {number: {key: copied(value) for key, value in before[number].items()} for number in numbers}
        done = False
        try:
            yield
            done = True
        finally:
            for number in numbers:
                changes = self._take_back(number, before[number], kept[number], versions[number])
                if done:
                    self._changes[number] = changes

    def apply(self) -> None:
        """All updates of the step are done: show their values."""
        for number, changes in self._changes.items():
            group = self._groups[number]
            for key, change in changes.items():
                now = group.get(key, MISSING)
                if change.in_place:
                    if now is change.before:
                        now.copy_(change.after)
                elif now is change.before or (not isinstance(now, Tensor) and _same(now, change.before)):
                    group[key] = change.after
        self._changes = {}

    def _take_back(
        self, number: int, before: dict[str, Any], kept: dict[str, Any], versions: dict[str, int]
    ) -> dict[str, _Change]:
        group = self._groups[number]
        changes: dict[str, _Change] = {}
        for key, value in _values(group).items():
            old = before.get(key, MISSING)
            if isinstance(old, Tensor):
                if value is not old:
                    changes[key] = _Change(old, value)
                    group[key] = old
                elif old._version != versions[key]:
                    changes[key] = _Change(old, old.clone(), in_place=True)
                if old._version != versions[key]:
                    old.copy_(kept[key])
            elif old is MISSING:
                changes[key] = _Change(MISSING, value)
                del group[key]
            elif not _same(value, kept[key]):
                changes[key] = _Change(kept[key], value)
                group[key] = kept[key]
        return changes


def _values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _versions(group: dict[str, Any]) -> dict[str, int]:
    return {key: value._version for key, value in group.items() if isinstance(value, Tensor)}


def copied(value: Any) -> Any:
    """A copy of what may be changed in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, list | dict | set) else value


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
