"""Pagers among threads, in forked children, and at the end of a process."""

import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chunkft.streaming import Pager

TIERS = ["memory", "file"]


@pytest.fixture(params=TIERS)
def options(request, tmp_path):
    return {} if request.param == "memory" else {"state_dir": tmp_path / "state"}


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_threads_share_a_pager(options):
    pages, workers, rounds = 12, 3, 150
    counts = [0] * pages
    locks = [threading.Lock() for _ in range(pages)]
    with Pager([4096 + 8 * page for page in range(pages)], slots=workers, **options) as pager:

        def work(seed: int) -> None:
            order = random.Random(seed)
            for _ in range(rounds):
                page = order.randrange(pages)
                with locks[page]:
                    words = pager.acquire(page).view(torch.int64)
                    assert (words == counts[page]).all()
                    counts[page] += 1
                    words.fill_(counts[page])
                    pager.release(page, keep=order.random() < 0.3)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
        assert sum(counts) == workers * rounds
        pager.flush()
        for page in range(pages):
            assert (pager.host(page).view(torch.int64) == counts[page]).all()


def test_a_page_may_be_released_by_another_thread(options):
    with Pager([4096] * 2, **options) as pager:
        pager.acquire(0).fill_(3)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(pager.release, 0).result()
        pager.flush()
        assert (pager.host(0) == 3).all()


def test_closing_while_others_work_ends_them_with_an_error(options):
    pager = Pager([4096] * 8, **options)
    started = threading.Event()

    def work() -> str:
        try:
            for turn in range(10**9):
                pager.acquire(turn % 8)
                pager.release(turn % 8)
                started.set()
        except RuntimeError as error:
            return str(error)
        return "no error"

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        assert started.wait(60)
        pager.close()
        assert "closed" in result.result(60)


def test_forked_child_gets_an_error_and_ends(tmp_path):
    done = python(
        """
        import gc, os, sys, warnings
        from chunkft.streaming import Pager

        # Python >= 3.12 says that a fork of several threads is a risk: that is what is tried here
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

        def in_child(pager, held):
            calls = [lambda: pager.prefetch(0), lambda: pager.acquire(2), lambda: pager.release(1),
                     lambda: pager.discard(1), lambda: pager.evict(0), pager.flush, lambda: pager.host(3),
                     lambda: pager.state(0), pager.stats, pager.trace, pager.close]
            for call in calls:
                try:
                    call()
                except RuntimeError as error:
                    assert "child" in str(error) and str(os.getpid()) in str(error), error
                else:
                    os._exit(3)
            with Pager([4096] * 2) as own:
                own.acquire(1).fill_(5)
                own.release(1)
                own.flush()
                assert (own.host(1) == 5).all()

        for options in ({}, {"state_dir": sys.argv[1]}):
            pager = Pager([4096] * 4, **options)
            pager.acquire(0).fill_(1)
            pager.release(0, keep=True)
            held = pager.acquire(1)
            child = os.fork()
            if child == 0:
                in_child(pager, held)
                del pager, held
                gc.collect()
                sys.exit(7)  # through the handlers of atexit
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 7, status
            held.fill_(2)
            pager.release(1)
            pager.flush()
            assert (pager.host(0) == 1).all() and (pager.host(1) == 2).all()
            pager.close()
        print("fine")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_interpreter_exit_with_open_pagers(tmp_path):
    done = python(
        """
        import sys
        from chunkft.streaming import Pager
        memory, file = Pager([70_000] * 4), Pager([70_000] * 4, state_dir=sys.argv[1])
        class Cycle: pass
        cycle = Cycle()
        cycle.me, cycle.pager = cycle, Pager([4096] * 2)
        host = memory.host(0)
        for pager in (memory, file, cycle.pager):
            pager.acquire(0).fill_(11)
            pager.release(0, keep=True)
            pager.acquire(1).fill_(12)
            pager.release(1)
            pager.prefetch(2 % len(pager))
        held = memory.acquire(3)
        file.acquire(3)
        print("end")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    with Pager([70_000] * 4, state_dir=tmp_path, reopen=True) as pager:
        assert [int(pager.host(page)[69_999]) for page in range(4)] == [11, 12, 0, 0]


def test_exit_by_an_exception_writes_back_what_was_released(tmp_path):
    done = python(
        """
        import sys
        from chunkft.streaming import Pager
        pager = Pager([5000] * 4, state_dir=sys.argv[1])
        pager.acquire(1).fill_(1)
        pager.release(1, keep=True)
        pager.acquire(2).fill_(2)
        raise ValueError("in the middle")
        """,
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ValueError: in the middle")
    with Pager([5000] * 4, state_dir=tmp_path, reopen=True) as pager:
        assert [int(pager.host(page)[0]) for page in range(4)] == [0, 1, 0, 0]


def test_exit_on_another_thread_with_a_pager_of_its_own():
    done = python(
        """
        import threading
        from chunkft.streaming import Pager
        def work():
            pager = Pager([4096] * 4)
            for turn in range(200):
                pager.acquire(turn % 4).add_(1)
                pager.release(turn % 4)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print("end")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("moves", ["_acquiring", "_releasing"])
def test_a_thread_waits_for_room_while_calls_of_others_may_make_some(tmp_path, monkeypatch, moves):
    with Pager([4096] * 12, slots=3, state_dir=tmp_path / "state") as pager, ThreadPoolExecutor(1) as pool:
        engine = pager._home.engine
        real, asked, made = engine._room, threading.Event(), threading.Event()

        def room():
            asked.set()
            return real() if made.is_set() else None

        monkeypatch.setattr(engine, "_room", room)
        with engine._changed:
            setattr(engine, moves, 1)  # a call of another thread is under way in the core
        waiting = pool.submit(pager.acquire, 3)
        try:
            assert asked.wait(20)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        finally:
            made.set()
            with engine._changed:
                setattr(engine, moves, 0)
                engine._changed.notify_all()
        waiting.result(20)
        pager.release(3, dirty=False)
        made.clear()
        with pytest.raises(RuntimeError, match="no room for page 4"):
            pager.acquire(4)  # nobody is there to make any
