"""Names of parameters, whatever a model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# What torch.compile, FSDP1 and activation checkpointing put into names, at any depth.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """The name without the parts that wrappers of torch put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matched(saved: Iterable[str], ours: Iterable[str], what: str) -> dict[str, str] | None:
    """For each saved name that of the same parameter here, though one of the two models was wrapped.

    Names fit as they are, or without the parts that wrappers put into them, or without one prefix of all names
    (``module.``) on one side, or without ``module`` inside of them (DDP of a part).

    Args:
        saved: names that were saved.
        ours: names of the model.
        what: what they were saved in, for messages.

    Returns:
        None if they do not fit.

    Raises:
        ValueError: if two names become the same, so that nobody can tell which is meant.
    """
    saved, ours = list(dict.fromkeys(saved)), list(dict.fromkeys(ours))
    if set(saved) == set(ours):
        return {name: name for name in saved}
    for form in (canonical, _without_module):
        theirs, mine = _by_form(saved, form, what), _by_form(ours, form, "model")
        prefix = _prefix(theirs, mine)
        if prefix is not None:
            return {name: mine[key[len(prefix) :]] for key, name in theirs.items()}
        prefix = _prefix(mine, theirs)
        if prefix is not None:
            return {name: mine[prefix + key] for key, name in theirs.items()}
    return None


def _without_module(name: str) -> str:
    return ".".join(part for part in canonical(name).split(".") if part != "module")


def _by_form(names: list[str], form: Callable[[str], str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(form(name), name)
        if other != name:
            raise ValueError(
                f"{what} has the names {other!r} and {name!r}, which are the same without the parts of wrappers, so "
                "it cannot be told which one is meant; wrap the model as it was when it was saved"
            )
    return found


def _prefix(longer: Iterable[str], shorter: Iterable[str]) -> str | None:
    """What stands before all of the longer names, if they are the shorter ones otherwise."""
    long, short = sorted(longer), sorted(shorter)
    if len(long) != len(short) or not long or not long[0].endswith(short[0]):
        return None
    prefix = long[0][: len(long[0]) - len(short[0])]
    fits = (not prefix or prefix.endswith(".")) and long == [prefix + name for name in short]
    return prefix if fits else None
