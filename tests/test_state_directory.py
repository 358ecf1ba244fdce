"""Files of state take few descriptors, hold their lock no longer than needed, and stay where they were."""

import os
import subprocess
import sys

import pytest
import torch
from residencies import adamw
from toy_models import assert_same_state, tiny_loss, tiny_net

import chunkft
from chunkft.streaming import Pager


@pytest.mark.parametrize("page_bytes", [1, 4096])
def test_few_descriptors_serve_any_number_of_slices(tmp_path, page_bytes):
    program = f"""
import os, resource, sys, torch, chunkft
from torch import nn
model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(150)])
options = dict(chunks=2, interval=1, residency="stream", page_bytes={page_bytes})
optimizer = chunkft.ChunkAdamW(model, state_dir="state", **options)
assert sum(1 for _ in optimizer.plan.slices()) >= 300
for _ in range(2):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
before = len(os.listdir("/proc/self/fd"))
chunkft.save_checkpoint(optimizer, "saved")
state = optimizer.state_dict()
assert len(state["state"]) == 300
hosts = [pager.host(page) for pager in optimizer._store.pagers.values() for page in range(len(pager))]
assert len(os.listdir("/proc/self/fd")) == before + 1
del hosts
assert len(os.listdir("/proc/self/fd")) == before
chunkft.load_checkpoint(optimizer, "saved")
optimizer.load_state_dict(state)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=paths(), timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def paths():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_host_copy_that_outlives_its_pager_does_not_keep_the_directory(tmp_path):
    with Pager([5000] * 3, state_dir=tmp_path) as pager:
        pager.acquire(1).fill_(4)
        pager.release(1)
        kept = pager.read(1)
    with Pager([5000] * 3, state_dir=tmp_path, reopen=True) as again:
        assert torch.equal(again.read(1), kept)


@pytest.mark.parametrize(
    "mode", [{"residency": "stream"}, {"state_device": "paged"}], ids=["stream", "paged"]
)
def test_relative_directory_is_the_one_that_it_was_at_first(tmp_path, monkeypatch, mode):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = tiny_net()
    optimizer = adamw(model, chunks=2, interval=1, state_dir="state", **mode)
    os.chdir("elsewhere")
    for step in range(2):
        tiny_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    chunkft.save_checkpoint(optimizer, "saved")
    os.chdir("..")
    chunkft.load_checkpoint(optimizer, "elsewhere/saved")
    assert_same_state(optimizer.state_dict()["state"], state["state"])
    assert sorted(os.listdir()) == ["elsewhere", "state"]
    assert os.listdir("elsewhere") == ["saved"]
    optimizer.detach()


def test_relative_directory_of_a_pager_is_taken_up_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Pager([5000] * 3, state_dir="state") as pager:
        os.chdir("/")
        pager.acquire(1).fill_(4)
        pager.release(1)
        assert set(pager.read(1).tolist()) == {4}
    with Pager([5000] * 3, state_dir=tmp_path / "state", reopen=True) as again:
        assert set(again.read(1).tolist()) == {4}
