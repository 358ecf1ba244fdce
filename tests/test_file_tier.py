"""Pages in a file: content, and what is flipped, cut off, old or foreign is told, by file and page."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from file_rigs import SIZES, offset_of, push_out, read_all, write_all

import chunkft.streaming.files as files
from chunkft.streaming import CorruptPageError, Pager
from chunkft.streaming.files import BLOCK, PageFile
from chunkft.streaming.workers import Workers


def damage(directory: Path, offset: int, content: bytes) -> None:
    with open(directory / files.NAME, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_closed_directory_is_taken_up_again(directory):
    for _ in range(2):
        with Pager(SIZES, state_dir=directory, reopen=True) as pager:
            assert read_all(pager) == [{10 + page} for page in range(len(SIZES))]


def test_new_pager_starts_with_zeros_in_an_old_directory(directory):
    with Pager([100] * 3, state_dir=directory) as pager:
        assert read_all(pager) == [{0}] * 3
        assert [int(pager.host(page).sum()) for page in range(3)] == [0] * 3


def test_memory_is_bounded_by_the_ring(tmp_path):
    with Pager([1 << 20] * 40, slots=2, state_dir=tmp_path) as pager:
        write_all(pager, 1)
        assert pager.stats().host_bytes == 4 << 20
        assert read_all(pager) == [{1 + page} for page in range(40)]
        assert pager.stats().file_writes == 40


def test_file_has_its_whole_size_from_the_start(tmp_path):
    with Pager([1 << 20] * 4, state_dir=tmp_path):
        status = (tmp_path / files.NAME).stat()
        assert status.st_size == BLOCK + 4 * (BLOCK + (1 << 20))
        assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("page", [0, 2, 4, 7])
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_is_told_by_file_and_page(directory, page, bit):
    last = offset_of(page) + SIZES[page] - 1
    damage(directory, last, bytes([(10 + page) ^ (1 << bit)]))
    with Pager(SIZES, state_dir=directory, reopen=True) as pager:
        pager.prefetch(page)
        with pytest.raises(CorruptPageError, match=rf"page {page} of .*{files.NAME} is damaged") as caught:
            pager.acquire(page)
        assert caught.value.page == page
        assert caught.value.path == directory / files.NAME
        other = (page + 1) % len(SIZES)
        assert set(pager.acquire(other).tolist()) == {10 + other}
        pager.release(other)
        # Repaired by writing the page anew.
        pager.acquire(page, load=False).fill_(3)
        pager.release(page)
    with Pager(SIZES, state_dir=directory, reopen=True) as pager:
        assert set(pager.acquire(page).tolist()) == {3}
        pager.release(page)


def test_flip_during_the_run_is_told(tmp_path):
    with Pager(SIZES, state_dir=tmp_path) as pager:
        write_all(pager, 10)
        push_out(pager, 0)
        damage(tmp_path, offset_of(0) + 100, b"\xff")
        with pytest.raises(CorruptPageError, match="page 0 of"):
            pager.acquire(0)


def test_old_content_of_a_page_is_not_taken_for_the_new(tmp_path):
    with Pager(SIZES, state_dir=tmp_path) as pager:
        write_all(pager, 10)
        pager.flush()
        start = offset_of(4)
        old = (tmp_path / files.NAME).read_bytes()[start : start + SIZES[4]]
        write_all(pager, 50)
        push_out(pager, 4)
        damage(tmp_path, start, old)
        with pytest.raises(CorruptPageError, match="page 4 of"):
            pager.acquire(4)


def test_page_of_another_place_is_not_taken(directory):
    with Pager([4096] * 2, state_dir=directory) as pager:
        for page in range(2):
            pager.acquire(page, load=False).fill_(9)
            pager.release(page)
    content = (directory / files.NAME).read_bytes()
    damage(directory, BLOCK, content[3 * BLOCK : 5 * BLOCK])
    with pytest.raises(CorruptPageError, match=r"page 0 of .* has the header of page 1"):
        Pager([4096] * 2, state_dir=directory, reopen=True)


def test_damaged_header_is_told(directory):
    damage(directory, offset_of(3) - BLOCK + 20, b"\xff")
    with pytest.raises(CorruptPageError, match=r"page 3 of .* has a damaged header"):
        Pager(SIZES, state_dir=directory, reopen=True)


def test_truncated_file_is_told(directory):
    path = directory / files.NAME
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        CorruptPageError, match=r"page 7 of .* is cut off: it ends at byte \d+, the file at \d+"
    ):
        Pager(SIZES, state_dir=directory, reopen=True)


def test_truncation_during_the_run_is_told(tmp_path):
    with Pager(SIZES, state_dir=tmp_path) as pager:
        write_all(pager, 10)
        push_out(pager, 1)
        os.truncate(tmp_path / files.NAME, offset_of(1) + 8192)
        with pytest.raises(CorruptPageError, match=r"page 1 of .* ends after 8192 of 70000 bytes"):
            pager.acquire(1)
        with pytest.raises(CorruptPageError, match=r"page 2 of .* is cut off"):
            pager.host(2)


def test_emptied_and_missing_files_are_told(directory):
    os.truncate(directory / files.NAME, 0)
    with pytest.raises(CorruptPageError, match="is empty"):
        Pager(SIZES, state_dir=directory, reopen=True)
    with pytest.raises(FileNotFoundError, match=r"state_dir='.*nothing' holds no pages.chunkft"):
        Pager(SIZES, state_dir=directory / "nothing", reopen=True)
    assert not (directory / "nothing").exists()


def test_other_sizes_are_refused_and_nothing_is_changed(directory):
    before = (directory / files.NAME).read_bytes()
    for sizes in (SIZES[:-1], [*SIZES[:-1], 12_001]):
        with pytest.raises(ValueError, match="pages of other sizes than the"):
            Pager(sizes, state_dir=directory, reopen=True)
    assert (directory / files.NAME).read_bytes() == before


def test_foreign_file_is_left_as_it_is(tmp_path):
    (tmp_path / files.NAME).write_bytes(b"somebody's data")
    for reopen in (False, True):
        with pytest.raises(ValueError, match="is no page file of chunkft"):
            Pager([64], state_dir=tmp_path, reopen=reopen)
    assert (tmp_path / files.NAME).read_bytes() == b"somebody's data"


def test_what_is_written_into_the_host_copy_is_on_the_disk_after_flush(tmp_path):
    with Pager(SIZES, state_dir=tmp_path) as pager:
        for page in range(len(SIZES)):
            pager.host(page).fill_(30 + page)
        pager.flush()
    with Pager(SIZES, state_dir=tmp_path, reopen=True) as pager:
        assert read_all(pager) == [{30 + page} for page in range(len(SIZES))]


@pytest.mark.parametrize("leave", ["discard", "clean"])
def test_page_that_was_never_read_into_memory_is_read_again(directory, leave):
    with Pager(SIZES, state_dir=directory, reopen=True) as pager:
        pager.acquire(3, load=False).fill_(99)
        if leave == "discard":
            pager.discard(3)
        else:
            pager.release(3, dirty=False)
        assert set(pager.acquire(3).tolist()) == {13}
        pager.release(3)


def test_host_copy_of_a_page_that_is_still_in_memory_may_be_written(directory):
    with Pager(SIZES, state_dir=directory, reopen=True) as pager:
        pager.acquire(3)
        pager.release(3, dirty=False)
        assert pager.state(3) == "HOST"
        pager.host(3).fill_(99)
        assert set(pager.acquire(3).tolist()) == {99}
        pager.release(3)


def test_change_that_was_written_back_for_another_page_survives_a_discard(tmp_path):
    with Pager(SIZES, slots=1, state_dir=tmp_path) as pager:
        pager.acquire(0, load=False).fill_(5)
        pager.release(0, keep=True)
        pager.prefetch(1)
        while pager.state(0) == "DIRTY":  # until page 1 is read, and takes the slot
            time.sleep(0.001)
        pager.discard(0)
        pager.evict(1)
        assert set(pager.acquire(0).tolist()) == {5}
        pager.release(0)


@pytest.mark.parametrize("segment", [BLOCK, 3 * BLOCK, 8 << 20])
def test_pages_of_any_size_are_whole_in_any_number_of_segments(tmp_path, monkeypatch, segment):
    monkeypatch.setattr(files, "SEGMENT", segment)
    with Pager(SIZES, state_dir=tmp_path) as pager:
        contents = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in SIZES]
        for page, content in enumerate(contents):
            pager.acquire(page, load=False).copy_(content)
            pager.release(page)
        for page, content in enumerate(contents):
            assert torch.equal(pager.acquire(page), content)
            pager.release(page, dirty=False)
            pager.flush()
            assert torch.equal(pager.host(page), content)


def test_file_system_without_direct_input_and_output_is_served(tmp_path, monkeypatch):
    real = os.open

    def refuse(path: object, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with Pager(SIZES, state_dir=tmp_path) as pager:
        assert not pager.stats().file_direct
        write_all(pager, 10)
        assert read_all(pager) == [{10 + page} for page in range(len(SIZES))]


def test_threads_and_descriptors_end_with_the_pager(tmp_path):
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    Pager(SIZES, state_dir=tmp_path).close()
    before = count()
    for _ in range(3):
        with Pager(SIZES, state_dir=tmp_path) as pager:
            write_all(pager, 1)
        with pytest.raises(ValueError, match="other sizes"):
            Pager([1], state_dir=tmp_path, reopen=True)
    deadline = time.monotonic() + 20
    while any(now > then for now, then in zip(count(), before, strict=True)):
        assert time.monotonic() < deadline, (count(), before)
        time.sleep(0.01)  # a thread that was joined may take a moment to leave the process


def test_workers_carry_out_every_job_and_tell_the_first_error():
    workers = Workers(3, "test")
    assert workers.map(lambda x: x * x, range(50)) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        workers.map(lambda x: 1 // (x - 3), range(6))
    workers.close()


def test_page_file_refuses_a_second_holder(tmp_path):
    workers = Workers(1, "test")
    file = PageFile(tmp_path, [10], workers, reopen=False)
    with pytest.raises(RuntimeError, match="in use"):
        PageFile(tmp_path, [10], workers, reopen=True)
    file.close()
    PageFile(tmp_path, [10], workers, reopen=True).close()
    workers.close()
