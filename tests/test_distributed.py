"""Data parallelism: processes that see different batches take the same step, that of the joined batch."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import assert_same_weights, tiny_batch, tiny_net, weights

import chunkft

STEPS = 10
HALF = 3  # samples a process


class Gated(nn.Module):
    """Uses one of its branches only; which one differs between the processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](x)


def share_of(rank: int, step: int, model: nn.Module) -> Tensor:
    ids, labels = tiny_batch(step, 2 * HALF)
    part = slice(rank * HALF, (rank + 1) * HALF)
    return F.cross_entropy(model(ids[part]), labels[part])


def build(model: nn.Module) -> chunkft.ChunkAdamW:
    return chunkft.ChunkAdamW(
        model,
        lr=1e-2,
        chunks=3,
        interval=2,
        schedule="random",
        max_grad_norm=0.5,
        always_active="head",
        seed=2,
        process_group="default" if dist.is_initialized() else None,
    )


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = tiny_net(dtype=torch.float64)
        optimizer = build(model)
        for step in range(STEPS):
            loss = share_of(rank, step, model)
            # one process alone meets a gradient that is not finite
            (loss * float("nan") if step == 4 and rank == 1 else loss).backward()
            optimizer.step()
        result = {"weights": weights(model), "skipped": optimizer.skipped, "active": optimizer.active}

        scaled = tiny_net()
        with_scaler = chunkft.ChunkAdamW(
            scaled, lr=1e-2, chunks=3, interval=2, process_group=dist.group.WORLD
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
        for step in range(5):
            loss = share_of(rank, step, scaled)
            scaler.scale(loss * float("inf") if step == 2 and rank == 0 else loss).backward()
            scaler.step(with_scaler)
            scaler.update()
        result["scaled"] = weights(scaled)
        result["scaled skipped"] = with_scaler.skipped
        result["scale"] = scaler.get_scale()
        with_scaler.detach()

        with_scaler = chunkft.ChunkAdamW(scaled, lr=1e-2, chunks=3, process_group=dist.group.WORLD)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (4 + 3 * rank))
        scaler.scale(share_of(rank, 0, scaled)).backward()
        try:
            scaler.step(with_scaler)
        except RuntimeError as error:
            result["scales differ"] = str(error)

        gated = Gated()
        plain = chunkft.ChunkOptimizer(gated, torch.optim.SGD, lr=0.5, chunks=1, process_group="default")
        gated(torch.full((2, 5), 1.0 + rank), rank).sum().backward()
        plain.step()
        result["gated"] = weights(gated)
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_processes_stay_bit_identical(results):
    assert_same_weights(results[0]["weights"], results[1]["weights"])
    assert results[0]["active"] == results[1]["active"]


def test_two_processes_take_the_steps_of_the_joined_batch(results):
    model = tiny_net(dtype=torch.float64)
    optimizer = build(model)
    for step in range(STEPS):
        if step == 4:
            continue
        ids, labels = tiny_batch(step, 2 * HALF)
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()
    assert optimizer.active == results[0]["active"]
    for name, expected in weights(model).items():
        torch.testing.assert_close(results[0]["weights"][name], expected, rtol=1e-9, atol=1e-11)


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(results):
    assert [result["skipped"] for result in results] == [1, 1]


def test_processes_with_scalers_stay_bit_identical_and_scale_alike(results):
    assert [result["scaled skipped"] for result in results] == [1, 1]
    assert [result["scale"] for result in results] == [2.0**6, 2.0**6]
    assert_same_weights(results[0]["scaled"], results[1]["scaled"])


def test_scalers_of_different_scale_are_refused_on_every_process(results):
    for result in results:
        assert "different scales" in result["scales differ"]


def test_a_parameter_without_gradient_on_one_process_counts_as_zero_there(results):
    before = weights(Gated())
    for rank in range(2):
        # each branch gets half of the gradient of the process that used it: 2 samples of value 1 + rank
        for branch in range(2):
            moved = before[f"branches.{branch}.weight"] - results[rank]["gated"][f"branches.{branch}.weight"]
            torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * (1.0 + branch)))
        assert torch.equal(results[rank]["gated"]["branches.2.weight"], before["branches.2.weight"])
