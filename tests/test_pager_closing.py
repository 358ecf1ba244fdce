"""Whoever waits for a page of a file is woken by `close`, and by a failure of those who work for it."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkft.streaming import Pager
from chunkft.streaming.files import PageFile
from chunkft.streaming.workers import Workers

SIZE = 5000
WAITING = {
    "acquire": lambda pager: pager.acquire(0),
    "acquire another": lambda pager: pager.acquire(7),
    "discard": lambda pager: pager.discard(0),
    "evict": lambda pager: pager.evict(0),
    "host": lambda pager: pager.host(0),
    "flush": lambda pager: pager.flush(),
}


@pytest.fixture
def gate(monkeypatch):
    """Files are read only once this is set."""
    opened = threading.Event()
    read = PageFile.read

    def gated(file, page, buffer):
        assert opened.wait(60)
        read(file, page, buffer)

    monkeypatch.setattr(PageFile, "read", gated)
    yield opened
    opened.set()


@pytest.mark.parametrize("call", WAITING.values(), ids=WAITING)
def test_waiting_for_a_read_ends_with_close(tmp_path, gate, call):
    pager = Pager([SIZE] * 8, slots=1, state_dir=tmp_path)
    for page in range(3):  # the whole ring
        pager.prefetch(page)
    waiting = threading.Event()
    wait = pager._home.engine._changed.wait
    pager._home.engine._changed.wait = lambda: (waiting.set(), wait())
    with ThreadPoolExecutor(2) as pool:
        caller = pool.submit(call, pager)
        assert waiting.wait(60)
        closer = pool.submit(pager.close)
        with pytest.raises(RuntimeError, match="the pager is closed"):
            caller.result(60)
        assert not closer.done()  # the reads that were begun
        gate.set()
        closer.result(60)
    Pager([SIZE] * 8, state_dir=tmp_path, reopen=True).close()


@pytest.mark.parametrize(
    "method", ["acquire", "prefetch", "release", "discard", "evict", "host", "read", "state"]
)
def test_call_that_meets_a_pager_in_the_middle_of_closing_is_told(tmp_path, gate, method):
    pager = Pager([SIZE] * 8, state_dir=tmp_path)
    pager.prefetch(0)
    with ThreadPoolExecutor(1) as pool:
        closer = pool.submit(pager._home.engine.close)
        while not pager._home.engine._closing:
            pass
        with pytest.raises(RuntimeError, match="the pager is closed"):
            getattr(pager, method)(0)
        gate.set()
        closer.result(60)
    pager._home.engine.close = lambda: None


def test_release_that_was_begun_before_close_is_in_the_file(tmp_path):
    pager = Pager([SIZE] * 4, state_dir=tmp_path)
    pager.acquire(2).fill_(9)
    engine = pager._home.engine
    begun, go_on = threading.Event(), threading.Event()
    call = engine._call

    def held_up(*arguments, **named):
        begun.set()
        assert go_on.wait(60)
        return call(*arguments, **named)

    engine._call = held_up
    with ThreadPoolExecutor(2) as pool:
        release = pool.submit(pager.release, 2)
        assert begun.wait(60)
        closer = pool.submit(pager.close)
        while not engine._closing:
            pass
        go_on.set()
        release.result(60)
        closer.result(60)
    with Pager([SIZE] * 4, state_dir=tmp_path, reopen=True) as again:
        assert set(again.read(2).tolist()) == {9}


def test_failure_of_our_own_in_a_thread_reaches_the_one_who_waits(tmp_path, monkeypatch):
    pager = Pager([SIZE] * 4, state_dir=tmp_path)

    def broken(*_):
        raise ZeroDivisionError("broken")

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(pager._home.engine, "_record", broken)
        with pytest.raises(ZeroDivisionError):
            pool.submit(pager.acquire, 0).result(60)
    pager.acquire(0).fill_(5)
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(pager._home.engine, "_record", broken)
        pager.release(0)
        with pytest.raises(ZeroDivisionError):
            pool.submit(pager.flush).result(60)
    pager.close()
    with Pager([SIZE] * 4, state_dir=tmp_path, reopen=True) as again:
        assert set(again.read(0).tolist()) == {5}


def test_thread_goes_on_behind_a_job_that_raises(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    workers = Workers(1, "test")
    workers.submit(lambda: 1 // 0)
    assert workers.map(lambda x: x + 1, range(3)) == [1, 2, 3]
    workers.close()
    assert [args.exc_type for args in told] == [ZeroDivisionError]


def test_threads_that_were_started_end_when_the_next_one_is_refused(monkeypatch):
    start, left = threading.Thread.start, [2]

    def refuse(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        Workers(4, "refused")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("refused")]


def test_interpreter_ends_while_others_acquire(tmp_path):
    program = """
import sys, threading, time
from chunkft.streaming import Pager
sys.setswitchinterval(1e-5)
pager = Pager([5000] * 40, slots=3, state_dir=sys.argv[1])
def work(page):
    while True:
        try:
            pager.acquire(page); pager.release(page)
        except ValueError:
            pass
        except RuntimeError as error:
            if "closed" in str(error): return
        page = (page + 7) % 40
for page in range(3):
    threading.Thread(target=work, args=(page,), daemon=True).start()
time.sleep(0.05)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
