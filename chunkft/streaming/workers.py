"""A few threads that carry out file work beside the caller."""

import queue
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["Workers"]

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """`count` daemon threads that take jobs in order.

    Not `concurrent.futures`: its threads are gone before the handlers of `atexit` run, and those have to write
    back what an open pager still holds.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(count)]
        self._threads: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def submit(self, job: Callable[[], None]) -> None:
        """Let a thread run `job`, which must not raise."""
        self._jobs.put(job)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return `function` of every item, in order; raises the first of its exceptions once all have ended."""
        work = list(items)
        if len(work) == 1:
            return [function(work[0])]
        results: dict[int, R] = {}
        errors: dict[int, BaseException] = {}
        left = threading.Semaphore(0)

        def run(index: int) -> None:
            try:
                results[index] = function(work[index])
            except BaseException as error:
                errors[index] = error
            finally:
                left.release()

        for index in range(len(work)):
            self.submit(lambda index=index: run(index))  # type: ignore[misc]
        for _ in work:
            left.acquire()
        if errors:
            raise errors[min(errors)]
        return [results[index] for index in range(len(work))]

    def close(self) -> None:
        """Let the threads end after the jobs that they have; waits for them."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except (
                BaseException
            ):  # a thread that ends would leave the jobs behind this one, and who waits for them
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
