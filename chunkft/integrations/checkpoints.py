"""Checkpoint directories that are complete or absent: written aside, flushed to disk, then renamed."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "CheckpointWriteError",
    "clean_up",
    "complete_checkpoints",
    "flush_tree",
    "publish",
    "rotate",
    "staging",
    "writing",
]

COMPLETE = re.compile(r"checkpoint-(\d+)")
STAGED = ".saving-"
REPLACED = ".replaced-"
DELETED = ".deleted-"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; what was there before is untouched."""


def complete_checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoint directories under `root`, oldest step first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def clean_up(root: str | Path) -> list[Path]:
    """Removes what a killed process left half-written or half-deleted under `root`, and returns those paths.

    A checkpoint that was moved aside to be replaced goes back to its place if the new one never arrived.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    removed = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(REPLACED):
            target = root / path.name.removeprefix(REPLACED)
            if not target.exists():
                path.rename(target)
                continue
        elif not path.name.startswith((STAGED, DELETED)):
            continue
        shutil.rmtree(path)
        removed.append(path)
    return removed


@contextlib.contextmanager
def staging(root: str | Path, name: str) -> Iterator[Path]:
    """Gives a directory in which `name` may be written; it is removed at the end, with whatever was not
    published.
    """
    root = Path(root)
    aside = root / f"{STAGED}{name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(staged: Path, target: Path) -> None:
    """Flushes the directory `staged` to disk and renames it to `target`, replacing a directory that is
    there.
    """
    flush_tree(staged)
    if target.exists():
        aside = target.with_name(f"{REPLACED}{target.name}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        staged.rename(target)
        _flush(target.parent)
        shutil.rmtree(aside)
    else:
        staged.rename(target)
        _flush(target.parent)


def rotate(root: str | Path, keep: int | None, protected: Path | None = None) -> None:
    """Deletes the oldest checkpoints under `root` until `keep` are left, never `protected`; None or 0 keeps
    all.
    """
    if not keep or keep < 1:
        return
    for path in complete_checkpoints(root)[:-keep]:
        if protected is None or path.absolute() != protected.absolute():
            doomed = path.with_name(f"{DELETED}{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)


@contextlib.contextmanager
def writing(target: Path, directory: Path, expected: int) -> Iterator[None]:
    """Turns a failed write below `directory` into a CheckpointWriteError that names `target`, bytes written
    and needed.
    """
    try:
        yield
    except Exception as error:
        written = _tree_bytes(directory)
        free = shutil.disk_usage(target.parent).free
        raise CheckpointWriteError(
            f"{target} could not be written: {_cause(error)} after {written:,} bytes of about {expected:,}"
            f" ({free:,} bytes are free there); checkpoints written before are untouched"
        ) from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _tree_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Flushes every file and directory below `directory`, and itself, to disk."""
    for path in directory.rglob("*"):
        _flush(path)
    _flush(directory)
