"""What the optimizer says it holds, and that it holds no more."""

import gc
import weakref

import pytest
import torch
from helpers import holds_memory
from torch import nn
from toy_models import tiny_loss, tiny_net, train

import chunkft
from chunkft.autograd import records
from chunkft.streaming import HostArena

PAGE = 4096


def rounded(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def wide_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(96, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 65)
    ).to(dtype)


def wide_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, 96, dtype=model[0].weight.dtype)).float().square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("chunks", [2, 5, 8])
@pytest.mark.parametrize("partition", ["bytes", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_active_state_are_a_share_of_full_fine_tuning(chunks, partition, dtype):
    model = wide_model(dtype)
    elements = sum(p.numel() for p in model.parameters())
    optimizer = chunkft.ChunkAdamW(model, chunks=chunks, interval=1, partition=partition)
    # the largest row group: 64 rows of 384, and the biases, which are never cut
    slack = 64 * 384 if partition == "bytes" else 64 * (96 + 384 + 192) + 384
    bits = dtype.itemsize
    for _ in range(chunks + 1):
        model(torch.randn(3, 96, dtype=dtype)).float().square().sum().backward()
        memory = optimizer.memory()
        held = sum(p.grad.numel() * p.grad.element_size() for _, p in optimizer.active_parameters())
        dense = sum(p.grad.numel() for p in model.parameters() if holds_memory(p.grad) and p.dim() > 1)
        assert held == memory["gradients"]
        assert dense == 0
        assert memory["gradients"] <= bits * (elements / chunks + slack)
        pieces = [piece for piece, _ in optimizer.active_parameters()]
        optimizer.step()
        active = sum(piece.numel for piece in pieces)
        if pieces == [piece for piece, _ in optimizer.active_parameters()]:
            assert optimizer.memory()["state_active"] == 8 * active
    memory = optimizer.memory()  # this chunk was active before, so that its state is there
    assert 0 < memory["state_active"] <= 8 * (elements / chunks + slack)
    assert memory["weights"] == bits * elements
    if dtype == torch.bfloat16:
        assert 0 < memory["master_active"] <= 2 * (elements / chunks + slack)


@pytest.mark.parametrize(("master", "extra"), [("residual", [2]), ("fp32", [4]), ("none", [])])
def test_host_arenas_hold_exactly_the_state_of_the_chunks_that_were_active(master, extra):
    dtype = torch.float32 if master == "none" else torch.bfloat16
    model = wide_model(dtype)
    gc.collect()  # arenas of earlier tests would go meanwhile
    before = HostArena.live_bytes()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=2, master=master)
    expected = pages = 0
    for chunk in optimizer.plan:
        for _ in range(2):
            assert optimizer.memory()["state_host"] == expected
            wide_step(model, optimizer)
        sizes = [rounded(piece.numel * size) for piece in chunk.slices for size in (4, 4, *extra)]
        expected += sum(sizes)
        pages += -(-sum(sizes) // PAGE) * PAGE
        assert optimizer.memory()["state_host"] == expected
        assert HostArena.live_bytes() - before == pages
    for _ in range(3 * 8):  # later sweeps use the same memory
        wide_step(model, optimizer)
    assert optimizer.memory()["state_host"] == expected
    assert HostArena.live_bytes() - before == pages


def test_state_on_the_cpu_is_used_in_place():
    model = wide_model()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    for _ in range(2):
        wide_step(model, optimizer)
    addresses = {
        str(piece): optimizer.state[leaf]["exp_avg"].data_ptr()
        for piece, leaf in optimizer.active_parameters()
    }
    for _ in range(4):
        wide_step(model, optimizer)
    again = {str(p): optimizer.state[leaf]["exp_avg"].data_ptr() for p, leaf in optimizer.active_parameters()}
    assert again == addresses


def test_forgotten_state_takes_no_host_memory():
    model = wide_model()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1, keep_state=False)
    for _ in range(9):
        wide_step(model, optimizer)
    assert optimizer.memory()["state_host"] == 0


@pytest.mark.parametrize("end", ["detach", "forget"])
@pytest.mark.parametrize("loaded", [False, True])
def test_host_memory_is_given_back(end, loaded, tmp_path):
    gc.collect()
    before = HostArena.live_bytes()
    model = wide_model(torch.bfloat16)
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1, always_active="4.bias")
    for _ in range(6):
        wide_step(model, optimizer)
    assert HostArena.live_bytes() > before
    if loaded:
        held = HostArena.live_bytes()
        chunkft.save_checkpoint(optimizer, tmp_path / "c")
        for _ in range(3):
            chunkft.load_checkpoint(optimizer, tmp_path / "c")
        gc.collect()
        assert (
            HostArena.live_bytes() <= held + 2 * PAGE
        )  # what is always active has an arena too, once loaded
        wide_step(model, optimizer)
    if end == "detach":
        optimizer.detach()  # the optimizer itself may live on, in the hands of a scheduler
    else:
        del optimizer, model
    gc.collect()
    assert HostArena.live_bytes() == before


def test_a_refused_checkpoint_leaves_no_memory_behind():
    source, target = tiny_net(), tiny_net()
    first = chunkft.ChunkAdamW(source, chunks=3, interval=1)
    second = chunkft.ChunkAdamW(target, chunks=3, interval=1)
    train(source, first, tiny_loss, range(4))
    train(target, second, tiny_loss, range(4))
    state = first.state_dict()
    del state["state"]["norm.weight"]["tensors"]["exp_avg"]
    gc.collect()
    before = HostArena.live_bytes()
    with pytest.raises(ValueError, match="exp_avg"):
        second.load_state_dict(state)
    gc.collect()
    assert HostArena.live_bytes() == before


def test_nothing_dense_is_held_for_inactive_parameters():
    model = wide_model()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1)
    for _ in range(5):
        model(torch.randn(3, 96)).square().sum().backward()
        active = {id(leaf) for _, leaf in optimizer.active_parameters()}
        touched = {piece.name for piece, _ in optimizer.active_parameters()}
        for name, parameter in model.named_parameters():
            assert id(parameter) in active or not holds_memory(parameter.grad)
            assert name in touched or parameter.grad is None
            assert records(parameter) == (name in touched)
        optimizer.step()
        assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())


def test_the_state_of_two_chunks_is_never_held_beside_the_arenas():
    watched: list[weakref.ref] = []
    alive = []

    class Watching(torch.optim.AdamW):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            alive.append(sum(reference() is not None for reference in watched))

    model = wide_model()
    optimizer = chunkft.ChunkOptimizer(model, Watching, lr=1e-3, chunks=4, interval=2)
    for _ in range(4):
        wide_step(model, optimizer)
        # fresh state is ordinary memory; at the switch it goes into an arena, and this tensor has to go
        watched += [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
        wide_step(model, optimizer)
    assert len(watched) > 4
    assert len(alive) >= 5
    assert not any(alive)
