"""Directories that are replaced as a whole: written beside the old one, flushed to disk, then exchanged with it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PARTIAL = ".partial"
REPLACED = ".replaced"
_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replacing(
    directory: str | os.PathLike[str],
    nbytes: int,
    check: Callable[[Path], None],
    carry: Callable[[Path, Path], None],
) -> Iterator[Path]:
    """Gives a directory to write into; at the end of the block it takes the place of ``directory``.

    At any moment ``directory`` is the old one or the new one, whole; for that the file system must exchange two
    directories in one step, which those of Linux and macOS do. On others (NFS) it is absent between two renames; what
    a kill leaves then is put back by the next call. Half-written directories of killed processes are removed.

    Args:
        directory: its parents are made; a symbolic link is followed.
        nbytes: about how much will be written.
        check: gets the old directory, and raises if it must not be replaced.
        carry: gets the old and the new one before the exchange, to take over what is to stay.

    Raises:
        OSError: if something cannot be written (names directory and size); the old directory is as it was.
        ValueError: if ``directory`` is the current one.
    """
    # Whoever changes the current directory meanwhile does not move the new one.
    path = Path(os.path.realpath(directory))
    told = f"directory={os.fspath(directory)!r}"
    with contextlib.suppress(OSError):  # not there
        if os.path.samefile(path, os.curdir):
            raise ValueError(
                f"{told} is the current directory, which cannot be replaced; allowed is any other one"
            )
    stage: Path | None = None
    lock = -1
    outcome = "what was there before is untouched"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        if path.is_dir():
            check(path)
        elif path.exists():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free:,} bytes are free there")
        stage, lock = _make_stage(path)
        yield stage
        if path.is_dir():
            check(path)  # whatever was put there meanwhile
            carry(path, stage)
            shutil.copymode(path, stage)
        _flush_tree(stage)
        _put_in_place(stage, path)
        outcome = "the new one is in its place, but may not be on the disk yet"
        _flush(path.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(
            error.errno, f"{told} of {nbytes:,} bytes cannot be written: {why}; {outcome}"
        ) from error
    finally:
        if lock >= 0:
            os.close(lock)
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)  # half of the new one, or the old one


def _make_stage(path: Path) -> tuple[Path, int]:
    """A new directory beside ``path``, and a descriptor that has it locked while this process lives."""
    while True:
        stage = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
        stage.mkdir()
        lock = -1
        try:
            lock = os.open(stage, os.O_RDONLY | os.O_CLOEXEC)
            if _locked(lock) is not False and stage.exists():
                return stage, lock
        except BaseException:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(stage, ignore_errors=True)
            raise
        os.close(lock)  # another process took it for one of a process that is gone


def _locked(descriptor: int) -> bool | None:
    """Locks a directory; False if another process has it, None where directories cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _tidy(path: Path) -> None:
    """Removes what killed processes left beside ``path``, and puts back what they had moved aside."""
    for aside in sorted(path.parent.glob(f".{_literal(path.name)}.*{REPLACED}")):
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(path)
    for half in path.parent.glob(f".{_literal(path.name)}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(half, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _locked(descriptor) is True:
                    shutil.rmtree(half, ignore_errors=True)
            finally:
                os.close(descriptor)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _put_in_place(stage: Path, path: Path) -> None:
    if not path.exists():
        stage.rename(path)
        return
    try:
        exchange(stage, path)
        return
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{REPLACED}")
    path.rename(aside)
    try:
        stage.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def exchange(first: Path, second: Path) -> None:
    """Swap two directories of one file system in one step.

    Raises:
        OSError: with ENOSYS, EINVAL or ENOTSUP where system or file system cannot do that.
    """
    system = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        failed = system.renamex_np(a, b, ctypes.c_uint(_EXCHANGE))
    elif hasattr(system, "renameat2"):
        failed = system.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_EXCHANGE))
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(second))


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
