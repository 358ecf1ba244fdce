"""A pager does what a dictionary of byte strings does: 100,000 random operations, and short ones that shrink."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkft.streaming import Pager

SIZES = st.lists(st.sampled_from([1, 7, 64, 256, 300, 4096, 5000]), min_size=1, max_size=9)
OPERATIONS = (
    ["acquire"] * 6
    + ["release"] * 6
    + ["prefetch"] * 4
    + ["claim", "keep", "keep", "clean", "discard", "evict", "state", "host", "flush", "write_host"]
)


class Model:
    """What every page holds, told by a dictionary; each operation is compared with the pager's."""

    def __init__(self, pager: Pager, asynchronous: bool) -> None:
        self.pager = pager
        self.asynchronous = asynchronous  # pages take slots by themselves, once they are read from a file
        self.content = {page: bytes(size) for page, size in enumerate(pager.pages)}
        self.stored = dict(self.content)  # what discard() returns to
        self.held: dict[int, torch.Tensor] = {}
        self.written = 0

    def run(self, operation: str, page: int, value: int) -> None:
        if page in self.held and operation in ("acquire", "claim"):
            with pytest.raises(ValueError, match=rf"page {page}\b"):
                self.pager.acquire(page, load=operation == "acquire")
        elif page not in self.held and operation in ("release", "keep", "clean"):
            with pytest.raises(ValueError, match=rf"page {page}\b"):
                self.pager.release(page)
        else:
            getattr(self, operation)(page, value)

    def acquire(self, page: int, value: int, load: bool = True) -> None:
        if len(self.held) == self.pager.slots:
            with pytest.raises(RuntimeError, match=rf"page {page}\b"):
                self.pager.acquire(page, load=load)
            return
        self._note_stored(page)
        try:
            tensor = self.pager.acquire(page, load=load)
        except RuntimeError as error:
            message = str(error)
            # Slots may also be taken by pages that were prefetched.
            self._evict_others(page)
            tensor = self.pager.acquire(page, load=load)
        else:
            message = "slots"
        assert "slots" in message
        self.held[page] = tensor
        if load:
            assert bytes(tensor.numpy()) == self.content[page]

    def claim(self, page: int, value: int) -> None:
        self.acquire(page, value, load=False)
        if page in self.held:
            self._write(page, value)

    def release(self, page: int, value: int, keep: bool = False) -> None:
        self._write(page, value)
        self.content[page] = bytes(self.held.pop(page).numpy())
        self.pager.release(page, keep=keep)
        if not keep:
            self.stored[page] = self.content[page]

    def keep(self, page: int, value: int) -> None:
        self.release(page, value, keep=True)

    def clean(self, page: int, value: int) -> None:
        # A page that was changed must not be released as clean: put its content back first.
        self.held.pop(page).copy_(torch.frombuffer(bytearray(self.content[page]), dtype=torch.uint8))
        self.pager.release(page, dirty=False, keep=bool(value % 2))

    def prefetch(self, page: int, value: int) -> None:
        self._note_stored(page)
        self.pager.prefetch(page)

    def discard(self, page: int, value: int) -> None:
        self._note_stored(page)
        self.pager.discard(page)
        self.held.pop(page, None)
        if self.asynchronous:
            # A page that is read ahead may have taken the slot of a kept one at any moment, also before it was acquired
            # again: then its change was written back, and is what the host has.
            self.pager.flush()
            found = bytes(self.pager.host(page).numpy())
            assert found in (self.stored[page], self.content[page])
            self.stored[page] = found
        self.content[page] = self.stored[page]

    def evict(self, page: int, value: int) -> None:
        if page in self.held:
            with pytest.raises(ValueError, match="release it first"):
                self.pager.evict(page)
        else:
            self.pager.evict(page)
            self._note_stored(page)

    def state(self, page: int, value: int) -> None:
        state = self.pager.state(page)
        assert (state == "IN_USE") == (page in self.held)
        assert state != "POISONED"

    def host(self, page: int, value: int) -> None:
        try:
            found = bytes(self.pager.host(page).numpy())
        except RuntimeError as error:
            found = str(error).encode()
        if page in self.held:
            assert b"IN_USE" in found
            assert b"flush()" in found
        else:
            assert found == self.content[page] or b"flush()" in found

    def flush(self, page: int, value: int) -> None:
        self.pager.flush()
        for other in self.content:
            if other not in self.held:
                self.stored[other] = self.content[other]
                assert bytes(self.pager.host(other).numpy()) == self.content[other]

    def write_host(self, page: int, value: int) -> None:
        if page in self.held:
            return
        self.pager.flush()
        self.pager.discard(page)
        for other in self.content:
            if other not in self.held:
                self.stored[other] = self.content[other]
        self.pager.host(page).fill_(value)
        self.content[page] = self.stored[page] = bytes([value]) * self.pager.pages[page]

    def end(self) -> None:
        for page in list(self.held):
            self.release(page, 255)
        self.flush(0, 0)
        for page, content in self.content.items():
            assert bytes(self.pager.host(page).numpy()) == content
            self._evict_others(page)
            assert bytes(self.pager.acquire(page).numpy()) == content
            self.pager.release(page)

    def _evict_others(self, page: int) -> None:
        for other in self.content:
            if other != page and other not in self.held:
                self.pager.evict(other)
                self._note_stored(other)

    def _write(self, page: int, value: int) -> None:
        self.written += 1
        tensor = self.held[page]
        tensor.fill_(value)
        tensor[-1] = self.written % 256

    def _note_stored(self, page: int) -> None:
        if page not in self.held and self.pager.state(page) != "DIRTY":
            self.stored[page] = self.content[page]


def drive(sizes: list[int], slots: int, operations: list[tuple[str, int, int]], **options: Any) -> None:
    with Pager(sizes, slots=slots, trace_events=8, **options) as pager:
        model = Model(pager, asynchronous="state_dir" in options)
        for operation, page, value in operations:
            model.run(operation, page % len(sizes), value)
        model.end()


def random_operations(seed: int, count: int) -> list[tuple[str, int, int]]:
    order = random.Random(seed)
    return [(order.choice(OPERATIONS), order.randrange(1 << 16), order.randrange(256)) for _ in range(count)]


@given(sizes=SIZES, slots=st.integers(1, 4), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_pager_in_memory_is_a_dictionary(sizes, slots, seed):
    drive(sizes, slots, random_operations(seed, 2000))


@given(sizes=SIZES, slots=st.integers(1, 4), seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_pager_with_a_file_is_a_dictionary(sizes, slots, seed):
    with TemporaryDirectory() as directory:
        drive(sizes, slots, random_operations(seed, 2000), state_dir=Path(directory))


@given(
    sizes=SIZES,
    slots=st.integers(1, 3),
    operations=st.lists(
        st.tuples(st.sampled_from(sorted(set(OPERATIONS))), st.integers(0, 8), st.integers(0, 255)),
        max_size=40,
    ),
    file=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_short_sequences_of_operations_agree_with_a_dictionary(sizes, slots, operations, file):
    if not file:
        drive(sizes, slots, operations)
        return
    with TemporaryDirectory() as directory:
        drive(sizes, slots, operations, state_dir=Path(directory))
