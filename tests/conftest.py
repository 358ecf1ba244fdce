"""Fixtures that every test may use."""

import sys
from pathlib import Path

import pytest
import torch
from file_rigs import SIZES, write_all
from pager_rigs import missing, names, opened
from thorough import mark

from chunkft.streaming import Pager


def pytest_collection_modifyitems(items):
    mark(items)


def pytest_terminal_summary(terminalreporter, config):
    """Names the table of registers, spills and shared memory of the kernels that this run compiled."""
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    try:
        import aot
    except ImportError:  # no Triton here: nothing was compiled
        return
    finally:
        sys.path.pop(0)
    path = aot.write_table()
    if path is not None:
        terminalreporter.write_line(f"registers, spills and shared memory of every compiled kernel: {path}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """``torch.empty`` and its kin hand out NaN, so that a value that nobody wrote is seen."""

    def poisoned(function):
        def wrapper(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-77)

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(params=[1, 2], ids=lambda count: f"threads{count}")
def threads(request):
    """Runs a test with one and with two threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=names())
def rig(request, tmp_path, monkeypatch):
    """A place where pagers work: host threads, a file, the fake driver, a GPU where there is one."""
    why = missing(request.param)
    if why:
        pytest.skip(why)
    with opened(request.param, tmp_path, monkeypatch) as rig:
        yield rig


@pytest.fixture
def directory(tmp_path):
    """A directory that a pager was closed in; page p holds bytes 10 + p."""
    with Pager(SIZES, state_dir=tmp_path / "state") as pager:
        write_all(pager, 10)
    return tmp_path / "state"
