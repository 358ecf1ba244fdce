"""Processes for tests of many: four that wait for functions to run, and fresh ones for tests that kill them.

They are forked from one process that has imported what takes seconds, so that new ones are there in a tenth of one.
Functions and results travel through pipes of our own: a collective that hangs, hangs nobody here.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PROCESSES = 4
FAMILIES = ("bert", "gemma3", "gpt2", "llama", "mixtral", "qwen3_moe", "t5")
IMPORTED = [
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "pytest",
    "chunkft",
    *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES),
]


@dataclass(frozen=True)
class Failure:
    """What a rank gave in place of a result.

    Attributes:
        kind: name of the exception's class, ``"died"`` or ``"no answer"``.
        message: of the exception; of a process that died its exit code.
        details: the traceback, or where the threads of a rank that did not answer were.
    """

    kind: str
    message: str
    details: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.details}"


class RanksFailed(AssertionError):
    """Some ranks gave no result; ``outcomes`` has what each of them gave."""

    def __init__(self, what: str, outcomes: list[Any]) -> None:
        self.outcomes = outcomes
        failed = {rank: given for rank, given in enumerate(outcomes) if isinstance(given, Failure)}
        # those that raised first: the others wait for them
        order = sorted(failed, key=lambda rank: (failed[rank].kind == "no answer", rank))
        silent = [rank for rank in order if failed[rank].kind == "no answer"]
        head = f"{what} failed on rank {', '.join(map(str, order))} of {len(outcomes)}"
        if silent:
            head += f"; no answer from rank {', '.join(map(str, silent))}"
        first: dict[str, int] = {}
        for rank in order:
            text = str(failed[rank])
            same = first.setdefault(text, rank)
            head += f"\n--- rank {rank}: {text if same == rank else f'as rank {same}'}"
        super().__init__(head)


class Pool:
    """A group of processes on this machine, joined by gloo.

    Args:
        processes: how many; the default process group has all of them.
        collective_timeout: seconds after which a collective gives up.
    """

    def __init__(self, processes: int = PROCESSES, collective_timeout: float = 60.0) -> None:
        self.processes = processes
        self._collective_timeout = collective_timeout
        self._jobs = 0
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        atexit.register(self.close)  # before multiprocessing joins its children

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, grace: float = 10.0
    ) -> list[Any]:
        """What ``function(group, *args)`` returned in each of the first ``world`` processes, by rank.

        Args:
            world: number of processes, whose group the function gets.
            function: of the top level of a module; it, its arguments and its result are pickled.
            timeout: seconds; ranks that have not answered then are killed.
            grace: seconds that the others have after the first rank failed.

        Raises:
            RanksFailed: if a rank raised, died or did not answer; the next call gets new processes.
        """
        outcomes = self.outcomes(world, function, *args, timeout=timeout, grace=grace)
        if any(isinstance(given, Failure) for given in outcomes):
            raise RanksFailed(getattr(function, "__qualname__", repr(function)), outcomes)
        return outcomes

    def outcomes(
        self,
        world: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        grace: float | None = None,
    ) -> list[Any]:
        """The same, with a ``Failure`` in the place of a result; ``grace`` is the timeout if it is None."""
        if not 1 <= world <= self.processes:
            raise ValueError(
                f"world={world} is not allowed; needs 1 to {self.processes}, the processes there are"
            )
        self._jobs += 1
        # the function's module is found once the path is known
        job = pickle.dumps((sys.path, world, self._jobs, pickle.dumps((function, args))))
        workers = self._started()[:world]
        for worker in workers:
            worker.send(job)
        outcomes = self._gathered(workers, timeout, grace)
        if not any(isinstance(given, Failure) for given in outcomes.values()):
            # each rank has checked by now that no collective of the function was left without its counterparts
            closing = self._gathered(workers, timeout, grace)
            outcomes |= {rank: given for rank, given in closing.items() if isinstance(given, Failure)}
        if any(isinstance(given, Failure) for given in outcomes.values()):
            self.close()  # their groups may be half-way through a collective
        return [outcomes[rank] for rank in range(world)]

    def close(self) -> None:
        """Kill the processes; the next call starts new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _started(self) -> list[_Worker]:
        if self._workers and not all(worker.process.is_alive() for worker in self._workers):
            self.close()
        if not self._workers:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
            folder = Path(self._folder.name)
            for rank in range(self.processes):
                self._workers.append(_Worker(rank, self.processes, folder, self._collective_timeout))
            ready = self._gathered(self._workers, 120.0, 5.0)
            if any(isinstance(given, Failure) for given in ready.values()):
                self.close()
                raise RanksFailed("start", [ready[rank] for rank in range(self.processes)])
        return self._workers

    def _gathered(self, workers: list[_Worker], timeout: float, grace: float | None) -> dict[int, Any]:
        """One message of each worker, by rank."""
        deadline = time.monotonic() + timeout
        open_ = {worker.connection: worker for worker in workers}
        outcomes: dict[int, Any] = {}
        while open_ and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(open_), left):
                assert isinstance(connection, Connection)
                worker = open_.pop(connection)
                given = worker.received()
                outcomes[worker.rank] = given
                if isinstance(given, Failure) and grace is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        for worker in open_.values():
            worker.ask_where()
        for worker in open_.values():
            outcomes[worker.rank] = Failure("no answer", "it was here:", worker.where())
        return outcomes


@contextmanager
def fresh_pool(world: int, collective_timeout: float = 60.0) -> Iterator[Pool]:
    """Processes of one test, which may kill them; their default group is of ``world`` ranks."""
    pool = Pool(world, collective_timeout)
    try:
        yield pool
    finally:
        pool.close()
        atexit.unregister(pool.close)


class _Worker:
    """One process, seen from the test's."""

    def __init__(self, rank: int, processes: int, folder: Path, collective_timeout: float) -> None:
        self.rank = rank
        self.log = folder / f"{rank}.log"
        self.log.touch()
        self._read = 0  # bytes of the log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(theirs, rank, processes, str(folder), collective_timeout), name=f"rank {rank}"
        )
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection

    def send(self, job: bytes) -> None:
        self._read = self.log.stat().st_size
        with suppress(OSError):  # it died: received() says so
            self.connection.send_bytes(job)

    def received(self) -> Any:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join(10)
            return Failure("died", f"exit code {self.process.exitcode}", self._said())

    def ask_where(self) -> None:
        """Let the process write into its log where its threads are."""
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)

    def where(self) -> str:
        """What it has said, once it says no more."""
        said = ""
        for _ in range(20):
            time.sleep(0.1)
            before, said = said, self._said()
            if said and said == before:
                break
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()

    def _said(self) -> str:
        """The last 8,000 characters of its log, since the job began."""
        return self.log.read_bytes()[self._read :].decode(errors="replace")[-8000:]


def _work(connection: Connection, rank: int, processes: int, folder: str, collective_timeout: float) -> None:
    """The life of a process: join the others, then run what comes until the connection ends."""
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    threading.Thread(target=_die_with_parent, daemon=True).start()

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=collective_timeout),
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, processes)}
    groups[processes] = dist.group.WORLD
    gc.freeze()  # what was imported: collections between jobs need not look at it
    _send(connection, None)
    while True:
        try:
            path, world, number, call = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        sys.path[:] = path
        torch.manual_seed(0)
        if _answer(connection, _call, call, groups[world]):
            _answer(connection, _check_matched, groups[world], number)
        gc.collect()


def _answer(connection: Connection, action: Callable[..., Any], *args: Any) -> bool:
    """Send what an action gives; whether that is no failure."""
    try:
        given = pickle.dumps(action(*args))
    except BaseException as error:
        _send(connection, Failure(type(error).__name__, str(error), traceback.format_exc()))
        return False
    connection.send_bytes(given)
    return True


def _send(connection: Connection, given: Any) -> None:
    # not connection.send(), in which torch would share the memory of tensors
    connection.send_bytes(pickle.dumps(given))


def _call(call: bytes, group: Any) -> Any:
    function, args = pickle.loads(call)
    return function(group, *args)


def _check_matched(group: Any, number: int) -> None:
    """Fail or hang if a rank has made a collective of its own: this one meets what was left of it."""
    import torch
    import torch.distributed as dist

    own = torch.tensor([number, 0x5EED])
    found = [torch.zeros_like(own) for _ in range(group.size())]
    dist.all_gather(found, own, group=group)
    assert all(torch.equal(one, own) for one in found), f"a collective was left unmatched: {found}, not {own}"


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
