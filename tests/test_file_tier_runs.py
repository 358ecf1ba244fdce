"""Whose directory it is: locks, killed runs, forked children, and when its content is whole."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from file_rigs import SIZES, read_all, write_all

import chunkft.streaming.files as files
from chunkft.streaming import CorruptPageError, Pager


def test_directory_in_use_is_refused_until_it_is_free(directory):
    with Pager(SIZES, state_dir=directory, reopen=True) as pager:
        for reopen in (False, True):
            with pytest.raises(RuntimeError, match=rf"in use by process {os.getpid()}; give each run"):
                Pager(SIZES, state_dir=directory, reopen=reopen)
        assert read_all(pager) == [{10 + page} for page in range(len(SIZES))]
    Pager(SIZES, state_dir=directory, reopen=True).close()


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_killed_run_leaves_a_directory_that_is_known_to_be_torn(tmp_path):
    run = child(
        """
        import sys, time
        from chunkft.streaming import Pager
        pager = Pager([300_000] * 8, state_dir=sys.argv[1])
        for turn in range(10**9):
            pager.acquire(turn % 8).fill_(turn % 256)
            pager.release(turn % 8)
            if turn == 20:
                print("busy", flush=True)
        """,
        tmp_path,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "busy\n"
    with pytest.raises(RuntimeError, match=f"in use by process {run.pid}"):
        Pager([300_000] * 8, state_dir=tmp_path)
    run.send_signal(signal.SIGKILL)
    run.wait()
    with pytest.raises(CorruptPageError, match=r"is torn: .* load a checkpoint"):
        Pager([300_000] * 8, state_dir=tmp_path, reopen=True)
    with Pager([300_000] * 8, state_dir=tmp_path) as pager:
        assert read_all(pager) == [{0}] * 8


def test_forked_child_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path):
    run = child(
        """
        import os, sys, time
        from chunkft.streaming import Pager
        pager = Pager([4096] * 8, state_dir=sys.argv[1])
        pager.flush()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), 9)
        """,
        tmp_path,
    )
    assert run.stdout is not None
    orphan = int(run.stdout.readline())
    run.wait()
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                Pager([4096] * 8, state_dir=tmp_path, reopen=True).close()
                break
            except RuntimeError:
                assert time.monotonic() < deadline, "the orphan holds the lock"
                time.sleep(0.05)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_directory_is_whole_between_flush_and_the_next_change(tmp_path):
    def whole() -> bool:
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        (copy / files.NAME).write_bytes((tmp_path / "state" / files.NAME).read_bytes())
        try:
            Pager(SIZES, state_dir=copy, reopen=True).close()
        except CorruptPageError as error:
            return "torn" not in str(error)
        return True

    with Pager(SIZES, state_dir=tmp_path / "state") as pager:
        assert whole()
        write_all(pager, 1)
        assert not whole()
        pager.flush()
        assert whole()
        pager.host(3)
        assert not whole()
        pager.flush()
        assert whole()
        pager.acquire(0)
        pager.release(0)
        while pager.state(0) != "HOST":
            time.sleep(0.001)
        assert not whole()
    assert whole()
