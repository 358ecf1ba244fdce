"""Model directories that are replaced as a whole: under faults of every OS call, kills at each of them, full disks."""

import errno
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

from chunkft.weights import replacing as replacing_module
from chunkft.weights.reading import open_weights
from chunkft.weights.writing import write_weights

CALLS = ("mkdir", "open", "write", "fsync", "rename")
ELEMENTS = (5, 40, 3, 0)


def write(directory, version, limit=100):
    """Writes a model all of whose files tell `version`."""
    values = {f"w{i}": torch.full((count,), float(version)) for i, count in enumerate(ELEMENTS)}
    write_weights(
        directory,
        values,
        max_shard_bytes=limit,
        extra=lambda stage: (stage / "config.json").write_text(str(version)),
    )


def version_of(directory):
    """The version of a whole model; raises if it is made of two, or not whole."""
    files = open_weights(directory)
    assert len(files.entries) == len(ELEMENTS)
    found = {float(value) for name in files.entries for value in files.read(name)}
    assert len(found) == 1, found
    assert float((directory / "config.json").read_text()) in found
    return int(found.pop())


def no_exchange(*_):
    raise OSError(errno.EINVAL, "no exchange here")


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """A kill needs no disk that forgets, and flushing is what takes the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=[("exchange", 1), ("two renames", 1), ("rename", None)], ids=lambda way: way[0])
def old(request, monkeypatch):
    """The version of the model that is there, by each way to put another in its place."""
    way, version = request.param
    if way == "two renames":
        monkeypatch.setattr(replacing_module, "exchange", no_exchange)
    return version


class NthCall:
    """Counts calls of the OS and of `exchange`; at the n-th one does something."""

    def __init__(self, monkeypatch, number, act):
        self.calls = 0
        self.number = number
        self.act = act
        for name in CALLS:
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))
        exchange = self.watched(replacing_module.exchange)
        monkeypatch.setattr(replacing_module, "exchange", exchange)

    def watched(self, function):
        def wrapper(*args, **kwargs):
            self.calls += 1
            if self.calls == self.number:
                self.act()
            return function(*args, **kwargs)

        return wrapper


def test_any_failing_call_leaves_a_whole_model_and_nothing_else(tmp_path, old):
    outcomes = []
    for number in range(1, 100):
        path = tmp_path / str(number) / "model"
        path.parent.mkdir()
        if old is not None:
            write(path, old)

        def fail():
            raise OSError(errno.EIO, "Input/output error")

        with pytest.MonkeyPatch.context() as patch:
            calls = NthCall(patch, number, fail)
            try:
                write(path, 2, limit=10)
                error = None
            except OSError as caught:
                error = caught
        if error is None:
            assert version_of(path) == 2
        elif "untouched" in str(error):
            assert version_of(path) == old if old is not None else not path.exists()
        else:
            assert "the new one is in its place" in str(error)
            assert version_of(path) == 2
        if os.listdir(path.parent) not in (["model"], []):  # a call of the removal of the old one
            assert error is None
            write(path, 3)
            assert os.listdir(path.parent) == ["model"]
        if error is not None:
            assert "Input/output error" in str(error)
            assert f"directory={os.fspath(path)!r}" in str(error)
        outcomes.append(error is None)
        if calls.calls < number:
            break
    else:
        pytest.fail("the calls have no end")
    assert outcomes.count(False) > 15


def test_killed_at_any_call_leaves_a_whole_model(tmp_path, old):
    absent = 0
    for number in range(1, 100):
        path = tmp_path / str(number) / "model"
        path.parent.mkdir()
        if old is not None:
            write(path, old)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                NthCall(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                try:
                    write(path, 2, limit=10)
                finally:
                    os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if path.exists():
            assert version_of(path) in (old, 2)
        else:
            absent += old is not None
            if old is not None:
                with pytest.raises(
                    FileNotFoundError, match=r"a save was interrupted.*\.model\.\w+\.replaced"
                ):
                    open_weights(path)
        # what is left over is put right by the next save, also if that fails
        replacing_module._tidy(path)
        assert os.listdir(path.parent) in (["model"], [])
        if old is not None:
            assert version_of(path) in (old, 2)
        write(path, 3)
        assert version_of(path) == 3
        assert os.listdir(path.parent) == ["model"]
        if done == 0:
            break
    else:
        pytest.fail("the calls have no end")
    assert number > 15
    assert absent == (replacing_module.exchange is no_exchange)


def test_killed_at_any_time_leaves_a_whole_model(tmp_path):
    path = tmp_path / "model"
    write(path, 0)
    rng = random.Random(7)
    last = 0
    for _ in range(20):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            version = last
            while True:
                version += 1
                write(path, version, limit=10)
                os.write(tell, b".")
        os.read(ready, 1)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)
        found = version_of(path)
        assert found > last
        last = found
    write(path, 1)
    assert os.listdir(tmp_path) == ["model"]


def test_everything_is_flushed_before_it_is_put_in_place(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write(path, 1)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    exchange = replacing_module.exchange

    def checked(stage, place):
        assert {entry.stat().st_ino for entry in (stage, *stage.iterdir())} <= set(flushed)
        flushed.clear()
        exchange(stage, place)

    monkeypatch.setattr(replacing_module, "exchange", checked)
    write(path, 2)
    assert flushed == [tmp_path.stat().st_ino]


def test_directory_of_a_writer_that_lives_is_left_alone(tmp_path):
    inside = []

    def meanwhile(stage):
        write(tmp_path / "model", 2)
        inside.append(sorted(os.listdir(tmp_path)) == sorted([stage.name, "model"]))

    write_weights(tmp_path / "model", {"w": torch.ones(3)}, extra=meanwhile)
    assert inside == [True]
    assert os.listdir(tmp_path) == ["model"]
    assert list(open_weights(tmp_path / "model").entries) == ["w"]


def refused(path, match, kind=OSError):
    before = {name: (path / name).read_bytes() for name in os.listdir(path)} if path.is_dir() else None
    others = sorted(os.listdir(path.parent)) if path.parent.is_dir() else None
    with pytest.raises(kind, match=match) as caught:
        write(path, 2)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before
    if others is not None:
        assert sorted(os.listdir(path.parent)) == others
    return caught.value


def test_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write(path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
        error = refused(
            path, rf"model' of 192 bytes cannot be written: {os.strerror(errno.EFBIG)}; .* untouched"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert error.errno == errno.EFBIG
    usage = shutil.disk_usage(tmp_path)._replace(free=191)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert (
        refused(path, "No space left on device: 191 bytes are free there; .* untouched").errno == errno.ENOSPC
    )
    assert version_of(path) == 1


def test_file_in_the_place_or_above_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(tmp_path / "file", "cannot be written: it is a file").errno == errno.ENOTDIR
    refused(tmp_path / "file" / "model", "cannot be written: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="/sys refuses new directories on Linux, to root as well")
def test_parent_that_is_read_only_is_refused():
    with pytest.raises(OSError, match=r"directory='/sys/model' of 192 bytes cannot be written: "):
        write("/sys/model", 2)


def test_current_directory_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "model", 1)
    monkeypatch.chdir(tmp_path / "model")
    for name in (".", tmp_path / "model"):
        with pytest.raises(ValueError, match="is the current directory"):
            write(name, 2)
    assert version_of(tmp_path / "model") == 1


@pytest.mark.parametrize("name", ["notes.txt", "pytorch_model.bin", "optimizer.pt", ".git", "data"])
def test_directory_with_other_files_is_refused(tmp_path, name):
    path = tmp_path / "model"
    write(path, 1)
    if "." in name[1:]:
        (path / name).write_text("mine")
    else:
        (path / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds '{name}', no part of a model.*allowed is a new or empty"):
        write(path, 2)
    assert version_of(path) == 1
    assert (path / name).exists()
    assert os.listdir(tmp_path) == ["model"]


def test_what_lies_beside_the_weights_stays(tmp_path):
    path = tmp_path / "model"
    write(path, 1, limit=10)
    texts = {"tokenizer.json": "t", "README.md": "r", "merges.txt": "m", "generation_config.json": "g"}
    for name, text in texts.items():
        (path / name).write_text(text)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("j")
    path.chmod(0o750)
    write(path, 2, limit=1000)
    assert version_of(path) == 2
    # generation_config.json belongs to the old config
    assert sorted(os.listdir(path)) == [
        *("README.md", "additional_chat_templates", "config.json", "merges.txt"),
        *("model.safetensors", "tokenizer.json"),
    ]
    assert (path / "additional_chat_templates" / "rag.jinja").read_text() == "j"
    assert path.stat().st_mode & 0o777 == 0o750
    write_weights(
        path, {"w": torch.ones(1)}, extra=lambda stage: (stage / "tokenizer.json").write_text("new")
    )
    assert sorted(os.listdir(path)) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert (path / "tokenizer.json").read_text() == "new"


def test_symbolic_link_is_followed_and_parents_are_made(tmp_path):
    write(tmp_path / "deep" / "er" / "model", 1)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "model")
    write(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert version_of(tmp_path / "deep" / "er" / "model") == 2
