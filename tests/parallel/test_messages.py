"""How messages are laid out, who carries them, and where they are copied: what GPUs need and CPUs do not show."""

import contextlib
import inspect
import subprocess
import sys
import threading

import pytest
import rigs
import torch
import torch.distributed as dist
from rank_fault_rigs import KINDS, build, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import chunkft
from chunkft.cli.fsdp import shard
from chunkft.optim import sharded_checkpoint
from chunkft.parallel import Ranks, padded, ranks, reducer


def places(group, kind):
    """Bytes at which parts of messages begin, whose leaves have odd sizes."""
    found = []
    exchange, spread = Ranks.exchange, Ranks.spread

    def exchanged(self, sent, send_sizes, *args):
        for size in (*send_sizes, sent.numel()):
            found.append(size * sent.element_size())
        return exchange(self, sent, send_sizes, *args)

    def gathered(self, own, *args):
        found.append(own.numel() * own.element_size())
        return spread(self, own, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "exchange", exchanged)
        patch.setattr(Ranks, "spread", gathered)
        model, optimizer = build(kind, group, width=13)
        for step in range(3):
            loss_of(model, step, dist.get_rank(group)).backward()
            optimizer.step()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_messages_are_aligned(pool, kind):
    for found in pool.run(2, places, kind):
        assert len(found) > 20
        assert all(size % 16 == 0 for size in found)


def test_padding_fills_up_sixteen_bytes():
    assert [padded(numel, 2) for numel in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert padded(3, 4) == 4
    assert padded(1, 32) == 1


def made(group):
    """With what the communicator of an optimizer was made."""
    calls = []
    new_group = dist.new_group

    def noting(*args, **kwargs):
        calls.append((kwargs["backend"], dist.distributed_c10d._get_default_group().bound_device_id))
        return new_group(*args, **kwargs)

    world = dist.distributed_c10d._get_default_group()
    before = world.bound_device_id
    world.bound_device_id = torch.device("cuda", 0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "new_group", noting)
            patch.setattr(ranks, "_channels", {})
            Ranks(group)
        assert world.bound_device_id == torch.device("cuda", 0)
    finally:
        world.bound_device_id = before
    return calls, dist.get_backend_config(group)


def test_a_communicator_is_made_by_its_members_alone_with_the_backend_of_their_group(pool):
    for calls, backend in pool.run(2, made):
        assert calls == [(backend, None)]


ENDS = """
import time

time.sleep = lambda seconds: print("waits", seconds)

import torch.distributed as dist

from chunkft.parallel import Ranks

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(2):
    Ranks(dist.group.WORLD).objects(1, "a test")
print("ends")
"""


def test_threads_of_gloo_have_time_to_end_before_the_interpreter_does():
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.split("\n")[-3:] == ["ends", f"waits {ranks.THREADS_END_WITHIN}", ""]


def saves(group, directory):
    """In which thread a checkpoint is written."""
    model, optimizer = build("replicas", group)
    loss_of(model, 0, dist.get_rank(group)).backward()
    optimizer.step()
    threads = []
    save = sharded_checkpoint._Saver._save

    def noting(self, *args):
        threads.append(threading.current_thread() is threading.main_thread())
        save(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_checkpoint._Saver, "_save", noting)
        here = threading.current_thread() is threading.main_thread()
        background = chunkft.save_sharded(optimizer, directory, asynchronous=True)
        chunkft.save_sharded(optimizer, directory)
        assert background.done()
    return here, threads


def test_a_checkpoint_that_is_waited_for_is_written_where_it_is_asked_for(pool, tmp_path):
    for here, threads in pool.run(2, saves, tmp_path / "saved"):
        assert threads == [False, here]
        assert here


def wires(group, adds_up):
    """In which dtype the command lets gradients of 16-bit shards travel."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])).bfloat16()
    shard(model, torch.device("cpu"), adds_up)
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    return {optimizer._team._sharded.wire_dtype(name) for name, _ in model.named_parameters()}


def test_gradients_of_16_bit_shards_are_fp32_on_their_way_only_where_they_are_added_up(pool):
    assert pool.run(4, wires, False) == [{torch.bfloat16}] * 4
    assert pool.run(4, wires, True) == [{torch.float32}] * 4


def receives(group, fails):
    """Rank 1 runs out of memory once while it takes the last bucket, at the end of a backward pass, and goes on."""
    model, optimizer = build("replicas", group, chunks=1)
    within, left = reducer._within, [1] if fails and dist.get_rank(group) else []

    def flaky(outer, inner, tensor):
        callers = [frame.function for frame in inspect.stack(0)[1:4]] if left else []
        if callers[:1] == ["_receive"] and "flush" in callers:
            left.pop()
            raise MemoryError
        return within(outer, inner, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducer, "_within", flaky)
        for step in range(3):
            expected = pytest.raises(MemoryError) if left else contextlib.nullcontext()
            with expected:
                loss_of(model, step, dist.get_rank(group)).backward()
            optimizer.step()
    return rigs.digest(model)


def test_an_error_while_a_bucket_is_received_loses_none_of_it(pool):
    assert pool.run(2, receives, True) == pool.run(2, receives, False)


def other_group(group):
    """A group that is not that of the whole mesh."""
    model = nn.Linear(6, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"over \[0, 1, 2, 3\]"):
        chunkft.ChunkAdamW(model, chunks=1, process_group=mesh["shards"].get_group())
    chunkft.ChunkAdamW(model, chunks=1, process_group=dist.group.WORLD)


def test_a_group_that_is_not_that_of_hybrid_shards_is_refused(pool):
    pool.run(4, other_group)


def test_the_factor_of_a_token_mean_is_not_rounded():
    loss = torch.tensor(300.0, dtype=torch.bfloat16, requires_grad=True)
    mean = chunkft.token_mean(loss, tokens=300)
    mean.backward()
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(300 / 300, rel=1e-6)
    assert loss.grad is not None
