"""Full disks, refused memory, reads and writes that fail: told, nothing lost, tried again."""

import contextlib
import errno
import os

import pytest
from file_rigs import SIZES, read_all, write_all

import chunkft.streaming.files as files
import chunkft.streaming.homes as homes
from chunkft.streaming import CorruptPageError, Pager
from chunkft.streaming.files import BLOCK


def test_full_disk_raises_before_anything_is_changed(directory, monkeypatch):
    before = (directory / files.NAME).read_bytes()
    with pytest.raises(OSError, match=r"must have room for \d+ bytes, \d+ are free") as caught:
        Pager([1 << 28] * 2**14, state_dir=directory)
    assert caught.value.errno == errno.ENOSPC
    assert (directory / files.NAME).read_bytes() == before
    with pytest.raises(OSError, match="must have room for"):
        Pager([1 << 28] * 2**14, state_dir=directory / "new")
    assert not list((directory / "new").iterdir())


def test_pager_that_gets_no_memory_gives_its_directory_back(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(homes, "host_memory", refuse)
        with pytest.raises(OSError, match="no memory"):
            Pager(SIZES, state_dir=tmp_path)
    Pager(SIZES, state_dir=tmp_path, reopen=True).close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_refused_preallocation_leaves_no_file(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        Pager([4096], state_dir=tmp_path)
    assert caught.value.errno == code
    assert not list(tmp_path.iterdir())


class Failing:
    """`os.pwrite` or `os.preadv` that fails from the n-th call on, `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, nth: int, times: int = 10**9) -> None:
        self.real = getattr(os, name)
        self.name, self.left, self.times = name, nth, times
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: object) -> int:
        self.left -= 1
        if self.left < 0 and self.times > 0:
            self.times -= 1
            raise OSError(errno.EIO, "Input/output error")
        return int(self.real(*arguments))


def test_failed_write_is_told_and_loses_nothing(tmp_path, monkeypatch):
    with Pager(SIZES, state_dir=tmp_path) as pager:
        write_all(pager, 10)
        pager.flush()
        with monkeypatch.context() as patch:
            Failing(patch, "pwrite", 0)
            pager.acquire(4).fill_(77)
            pager.release(4)
            with pytest.raises(OSError, match="Input/output error"):
                pager.flush()
            with pytest.raises(RuntimeError, match=r"page 4 .* call flush\(\)"):
                pager.host(4)
            with pytest.raises(OSError, match="Input/output error"):
                pager.acquire(5)
        pager.flush()
        assert set(pager.host(4).tolist()) == {77}
        assert set(pager.acquire(4).tolist()) == {77}
        pager.release(4)


@pytest.mark.parametrize("nth", range(5))
def test_write_that_fails_at_any_point_once_is_tried_again(tmp_path, monkeypatch, nth):
    monkeypatch.setattr(files, "SEGMENT", 64 * BLOCK)
    with Pager(SIZES, state_dir=tmp_path) as pager:
        write_all(pager, 10)
        pager.flush()
        Failing(monkeypatch, "pwrite", nth, times=1)
        pager.acquire(4).fill_(77)
        pager.release(4)
        with contextlib.suppress(OSError):
            pager.flush()
        pager.flush()
        assert set(pager.host(4).tolist()) == {77}
    with Pager(SIZES, state_dir=tmp_path, reopen=True) as pager:
        assert read_all(pager) == [{77} if page == 4 else {10 + page} for page in range(len(SIZES))]


def test_failed_read_may_be_tried_again(directory, monkeypatch):
    with Pager(SIZES, state_dir=directory, reopen=True) as pager:
        with monkeypatch.context() as patch:
            Failing(patch, "preadv", 0, times=1)
            pager.prefetch(1)
            with pytest.raises(OSError, match="Input/output error"):
                pager.acquire(1)
        assert set(pager.acquire(1).tolist()) == {11}
        pager.release(1)


def test_close_after_a_failed_write_raises_and_closes(tmp_path, monkeypatch):
    pager = Pager(SIZES, state_dir=tmp_path)
    with monkeypatch.context() as patch:
        Failing(patch, "pwrite", 1)
        pager.acquire(0).fill_(1)
        pager.release(0)
        with pytest.raises(OSError, match="Input/output error"):
            pager.close()
    assert pager.closed
    with pytest.raises(CorruptPageError, match="torn"):
        Pager(SIZES, state_dir=tmp_path, reopen=True)
    Pager(SIZES, state_dir=tmp_path).close()
