"""Copies and files that come late, each by a time that follows from a seed."""

import functools
import random
import time
import types

import chunkft.streaming.homes as homes
from chunkft.streaming.files import PageFile

SLOWEST = 1e-3


def delay(monkeypatch, seed):
    """Every pager that is made from now on is late: its copies in memory, and its reads and writes of files."""
    core = types.SimpleNamespace(Pager=functools.partial(homes._core.Pager, delay_seed=seed))
    monkeypatch.setattr(homes, "_core", core)
    times = random.Random(seed)
    for name in ("read", "write"):
        monkeypatch.setattr(PageFile, name, _late(getattr(PageFile, name), times))


def _late(method, times):
    def late(file, page, buffer):
        time.sleep(times.random() * SLOWEST)
        method(file, page, buffer)

    return late
