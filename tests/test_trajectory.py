"""The trajectory: K=1 is torch's AdamW bit for bit, K>1 is AdamW over masked dense gradients."""

import math

import pytest
import torch
from torch import nn
from toy_models import (
    PARTITIONS,
    MaskedAdamW,
    assert_same_weights,
    llama_loss,
    mlp,
    mlp_loss,
    order_of,
    tiny_llama,
    tiny_loss,
    tiny_net,
    train,
    weights,
)

import chunkft

MODELS = {"llama": (tiny_llama, llama_loss), "mlp": (mlp, mlp_loss), "net": (tiny_net, tiny_loss)}


def groups_of(model: nn.Module) -> list[dict]:
    """Matrices with decay, vectors without, and the last matrix at a learning rate of its own."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices[:-1], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3},
        {"params": matrices[-1:], "weight_decay": 0.01, "lr": 5e-4, "betas": (0.8, 0.95)},
    ]


@pytest.mark.parametrize("kind", ["llama", "mlp"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_chunk_is_adamw_bit_for_bit(kind, decay):
    build, loss = MODELS[kind]
    dense, chunked = build(), build()
    reference = torch.optim.AdamW(dense.parameters(), lr=2e-3, weight_decay=decay)
    optimizer = chunkft.ChunkAdamW(chunked, lr=2e-3, weight_decay=decay, chunks=1, interval=7)
    for step in range(100):
        train(dense, reference, loss, [step])
        train(chunked, optimizer, loss, [step])
        assert_same_weights(dense, chunked)
    assert optimizer.updates == 100


@pytest.mark.parametrize(("kind", "amsgrad"), [("llama", False), ("mlp", False), ("mlp", True)])
def test_one_chunk_is_adamw_with_groups_scheduler_clipping_and_accumulation(kind, amsgrad):
    build, loss = MODELS[kind]
    dense, chunked = build(), build()
    reference = torch.optim.AdamW(groups_of(dense), lr=2e-3, amsgrad=amsgrad)
    chunkft.attach(chunked)
    optimizer = chunkft.ChunkOptimizer(
        groups_of(chunked),
        torch.optim.AdamW,
        lr=2e-3,
        amsgrad=amsgrad,
        chunks=1,
        interval=13,
        max_grad_norm=0.3,
    )
    clipped = 0
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda n: min(1.0, (n + 1) / 9) * (1 - n / 101))
        for o in (reference, optimizer)
    ]
    for step in range(100):
        for micro in range(3):
            (loss(dense, 3 * step + micro) / 3).backward()
            (loss(chunked, 3 * step + micro) / 3).backward()
        norm = nn.utils.clip_grad_norm_(dense.parameters(), 0.3)
        clipped += bool(norm > 0.3)
        for o, scheduler in zip((reference, optimizer), schedulers, strict=True):
            o.step()
            o.zero_grad()
            scheduler.step()
        assert torch.equal(optimizer.grad_norm, norm)
        assert_same_weights(dense, chunked)
    assert clipped > 0


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("schedule", ["cyclic", "reverse", "random"])
@pytest.mark.parametrize("keep_state", [True, False])
@pytest.mark.parametrize("slice_dim", [0, 1])
def test_chunks_are_masked_dense_adamw(partition, schedule, keep_state, slice_dim):
    # fp64: a gradient that is rounding noise makes AdamW step by the full learning rate in either direction.
    dense, chunked = (tiny_net(dtype=torch.float64) for _ in range(2))
    optimizer = chunkft.ChunkAdamW(
        chunked, lr=1e-2, weight_decay=0.1, chunks=3, interval=2, partition=partition, schedule=schedule,
        keep_state=keep_state, slice_dim=slice_dim, seed=5,
    )  # fmt: skip
    reference = MaskedAdamW(
        dense,
        optimizer.plan,
        order_of(schedule, 3, 5),
        2,
        lambda name: {"lr": 1e-2, "weight_decay": 0.1},
        keep_state,
    )
    seen = set()
    for step in range(15):
        assert [piece for piece, _ in optimizer.active_parameters()] == reference.active
        seen.add(optimizer.active)
        train(dense, reference, tiny_loss, [step])
        train(chunked, optimizer, tiny_loss, [step])
        for (name, a), b in zip(dense.named_parameters(), chunked.parameters(), strict=True):
            torch.testing.assert_close(
                b.detach(), a.detach(), rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n} {m}"
            )
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("always_active", ["head", ["*norm*", "head.bias"], "table.weight"])
@pytest.mark.parametrize("keep_state", [True, False])
def test_always_active_parameters_train_at_every_step(always_active, keep_state):
    dense, chunked = (tiny_net(dtype=torch.float64) for _ in range(2))
    optimizer = chunkft.ChunkAdamW(
        chunked, lr=1e-2, chunks=3, interval=2, always_active=always_active, keep_state=keep_state
    )
    assert optimizer.plan.always
    reference = MaskedAdamW(
        dense,
        optimizer.plan,
        order_of("cyclic", 3),
        2,
        lambda name: {"lr": 1e-2, "weight_decay": 0.01},
        keep_state,
    )
    always = {piece.name for piece in optimizer.plan.always}
    for step in range(14):
        before = weights(chunked)
        train(dense, reference, tiny_loss, [step])
        train(chunked, optimizer, tiny_loss, [step])
        for name, parameter in dense.named_parameters():
            now = chunked.get_parameter(name).detach()
            torch.testing.assert_close(now, parameter.detach(), rtol=1e-9, atol=1e-11)
            if name in always:
                assert not torch.equal(now, before[name]), name
    # one step count for the whole run, not one an interval
    counts = {
        int(optimizer.state[leaf]["step"])
        for piece, leaf in optimizer.active_parameters()
        if piece.name in always
    }
    assert counts == {14}


def test_chunks_with_groups_clipping_accumulation_and_scheduler_are_masked_dense_adamw():
    dense, chunked = (mlp(dtype=torch.float64) for _ in range(2))
    chunkft.attach(chunked)
    groups = groups_of(chunked)
    for group in groups:
        group.pop("betas", None)
    optimizer = chunkft.ChunkAdamW(
        groups, lr=2e-3, chunks=4, interval=3, max_grad_norm=0.2, schedule="random", seed=3
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    first = [id(group) for group in optimizer.param_groups]
    names = {"0.weight": (2e-3, 0.1), "3.weight": (5e-4, 0.01)}

    def hyper(name):
        lr, decay = names.get(name, (3e-3, 0.0))
        return {"lr": lr * 0.9**reference.steps, "weight_decay": decay}

    reference = MaskedAdamW(dense, optimizer.plan, order_of("random", 4, 3), 3, hyper, max_grad_norm=0.2)
    for step in range(30):
        train(dense, reference, mlp_loss, [step], accumulate=2)
        train(chunked, optimizer, mlp_loss, [step], accumulate=2)
        scheduler.step()
        for a, b in zip(dense.parameters(), chunked.parameters(), strict=True):
            torch.testing.assert_close(b.detach(), a.detach(), rtol=1e-8, atol=1e-10)
    assert [id(group) for group in optimizer.param_groups] == first
    assert math.isclose(optimizer.param_groups[0]["lr"], 2e-3 * 0.9**30)


def test_single_precision_slices_take_the_bits_of_torch_adamw_on_dense_gradients():
    dense, chunked = tiny_llama(), tiny_llama()
    optimizer = chunkft.ChunkAdamW(chunked, lr=3e-3, weight_decay=0.1, chunks=5, interval=1)
    reference = {
        piece: torch.optim.AdamW(
            [nn.Parameter(piece.of(dense.get_parameter(piece.name).detach()))], lr=3e-3, weight_decay=0.1
        )
        for piece in optimizer.plan.slices()
    }
    for step in range(20):
        llama_loss(dense, step).backward()
        for piece in optimizer.plan.chunks[step % 5].slices:
            (leaf,) = reference[piece].param_groups[0]["params"]
            leaf.grad = piece.of(dense.get_parameter(piece.name).grad).clone()
            reference[piece].step()
        dense.zero_grad()
        train(chunked, optimizer, llama_loss, [step])
        assert_same_weights(dense, chunked)


def test_a_custom_schedule_is_followed():
    asked = []

    def schedule(interval, chunks):
        asked.append((interval, chunks))
        return [2, 2, 0, 1][interval % 4]

    dense, chunked = (tiny_net(dtype=torch.float64) for _ in range(2))
    optimizer = chunkft.ChunkAdamW(chunked, chunks=3, interval=2, schedule=schedule)
    reference = MaskedAdamW(dense, optimizer.plan, lambda n: [2, 2, 0, 1][n % 4], 2)
    train(dense, reference, tiny_loss, range(17))
    train(chunked, optimizer, tiny_loss, range(17))
    for a, b in zip(dense.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(b.detach(), a.detach(), rtol=1e-9, atol=1e-11)
    assert {chunks for _, chunks in asked} == {3}


def test_state_kept_on_the_device_gives_the_same_bits_as_state_in_host_arenas():
    runs = []
    for state_device in ("host", "device", "auto"):
        model = tiny_net()
        optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=2, state_device=state_device)
        train(model, optimizer, tiny_loss, range(20))
        runs.append((model, optimizer.memory()["state_host"]))
    assert_same_weights(runs[0][0], runs[1][0])
    assert_same_weights(runs[0][0], runs[2][0])
    assert runs[0][1] > 0
    assert runs[1][1] == 0
