"""Training with paged state is bit for bit the training without: every residency, tier and base optimizer."""

import copy
import dataclasses
import errno
import gc
import weakref

import pytest
import torch
from residencies import FILES, MODES, adamw, in_memory
from toy_models import (
    WAYS,
    assert_same_state,
    assert_same_weights,
    llama_loss,
    mlp,
    mlp_loss,
    tiny_llama,
    tiny_loss,
    tiny_net,
    train,
)

import chunkft
from chunkft.optim.paged import PagedStore


@pytest.fixture(params=[*MODES, *FILES])
def mode(request, tmp_path):
    if request.param in FILES:
        return {**FILES[request.param], "state_dir": tmp_path / "state"}
    return dict(MODES[request.param])


@pytest.mark.parametrize("way", WAYS)
def test_three_sweeps_with_a_resume_in_the_middle_equal_training_in_memory(mode, way, tmp_path):
    model = tiny_net()
    paged = adamw(model, chunks=3, always_active=["norm.*"], schedule="random", **mode)
    plain_model = tiny_net()
    plain = in_memory(plain_model, paged.plan, adamw, schedule="random")
    train(model, paged, tiny_loss, range(9))
    train(plain_model, plain, tiny_loss, range(18))

    resumed_model = tiny_net(seed=5)
    resumed_model.load_state_dict(model.state_dict())
    other = {**mode, "state_dir": tmp_path / "other"} if "state_dir" in mode else mode
    resumed = adamw(resumed_model, chunks=3, always_active=["norm.*"], schedule="random", **other)
    WAYS[way](paged, resumed, tmp_path / "saved.safetensors")
    train(resumed_model, resumed, tiny_loss, range(9, 18))

    assert_same_weights(resumed_model, plain_model)
    assert_same_state(resumed.state_dict()["state"], plain.state_dict()["state"])
    assert (resumed.updates, resumed.sweep, resumed.interval_position) == (18, 3, 0)


BASES = {
    "amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    "no-state": (torch.optim.SGD, {"lr": 1e-1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "rprop": (torch.optim.Rprop, {"lr": 1e-3}),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", MODES)
def test_any_base_optimizer_pages_its_state(kind, name):
    base, arguments = BASES[name]
    results = []
    plan = None
    for options in (MODES[kind], None):
        model = mlp()
        own = {"chunks": 3, **options} if options is not None else {"chunks": None, "partition": plan}
        optimizer = chunkft.ChunkOptimizer(model, base, interval=1, **own, **arguments)
        plan = optimizer.plan
        train(model, optimizer, mlp_loss, range(7))
        results.append((model, optimizer.state_dict()["state"]))
    assert_same_weights(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


class CountsInGroup(torch.optim.Optimizer):
    """Keeps its step count in the group, as schedule-free optimizers do, and a tensor made anew at every step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sum"] = self.state[p].get("sum", torch.zeros_like(p)) + p.grad
                    p.sub_(self.state[p]["sum"], alpha=group["lr"] / (group["k"] + 1))
            group["k"] += 1


@pytest.mark.parametrize("kind", MODES)
def test_a_count_in_the_group_advances_once_a_step(kind):
    model, plain_model = mlp(), mlp()
    paged = chunkft.ChunkOptimizer(model, CountsInGroup, chunks=2, interval=2, **MODES[kind])
    plain = chunkft.ChunkOptimizer(plain_model, CountsInGroup, chunks=None, partition=paged.plan, interval=2)
    train(model, paged, mlp_loss, range(9))
    train(plain_model, plain, mlp_loss, range(9))
    assert paged.param_groups[0]["k"] == plain.param_groups[0]["k"]
    assert_same_weights(model, plain_model)


@pytest.mark.parametrize("kind", MODES)
def test_an_optimizer_that_cannot_be_probed_is_told_and_still_exact(kind):
    model, plain_model = mlp(), mlp()
    with pytest.warns(UserWarning, match="cannot be laid out ahead.*moved tensor by tensor"):
        paged = chunkft.ChunkOptimizer(
            model, torch.optim.Adafactor, chunks=2, interval=1, lr=1e-2, **MODES[kind]
        )
    plain = chunkft.ChunkOptimizer(
        plain_model, torch.optim.Adafactor, chunks=None, partition=paged.plan, interval=1, lr=1e-2
    )
    train(model, paged, mlp_loss, range(6))
    train(plain_model, plain, mlp_loss, range(6))
    assert_same_weights(model, plain_model)
    assert_same_state(paged.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("master", ["residual", "fp32", "stochastic", "none"])
@pytest.mark.parametrize("keep_state", [True, False])
@pytest.mark.parametrize("kind", MODES)
def test_masters_are_paged_and_outlive_forgotten_moments(kind, keep_state, master):
    model, plain_model = tiny_net(dtype=torch.bfloat16), tiny_net(dtype=torch.bfloat16)
    options = {"master": master, "keep_state": keep_state, "lr": 1e-3}
    paged = adamw(model, chunks=3, **options, **MODES[kind])
    plain = in_memory(plain_model, paged.plan, adamw, **options)
    train(model, paged, tiny_loss, range(14))
    train(plain_model, plain, tiny_loss, range(14))
    assert_same_weights(model, plain_model)
    assert_same_state(paged.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("kind", ["paged", "stream", "one-page-a-slice"])
def test_clipping_and_accumulation_are_those_of_training_in_memory(kind):
    model, plain_model = tiny_net(), tiny_net()
    paged = adamw(model, chunks=2, max_grad_norm=0.3, **MODES[kind])
    plain = in_memory(plain_model, paged.plan, adamw, max_grad_norm=0.3)
    train(model, paged, tiny_loss, range(9), accumulate=3)
    train(plain_model, plain, tiny_loss, range(9), accumulate=3)
    assert_same_weights(model, plain_model)
    assert torch.equal(paged.grad_norm, plain.grad_norm)


@pytest.mark.parametrize("kind", MODES)
def test_one_chunk_is_full_adamw(kind):
    """Down to K=1: what is updated a page at a time is the trajectory of torch.optim.AdamW."""
    model, dense_model = tiny_llama(), tiny_llama()
    optimizer = adamw(model, chunks=1, **MODES[kind])
    dense = torch.optim.AdamW(dense_model.parameters(), lr=1e-2, weight_decay=0.01)
    train(model, optimizer, llama_loss, range(5))
    train(dense_model, dense, llama_loss, range(5))
    assert_same_weights(model, dense_model)


@pytest.mark.parametrize("source", MODES)
@pytest.mark.parametrize("target", MODES)
def test_a_checkpoint_moves_between_residencies(source, target, tmp_path):
    model = tiny_net()
    optimizer = adamw(model, chunks=3, **MODES[source])
    train(model, optimizer, tiny_loss, range(5))
    chunkft.save_checkpoint(optimizer, tmp_path / "saved.safetensors")
    other_model = tiny_net(seed=4)
    other_model.load_state_dict(model.state_dict())
    other = adamw(other_model, chunks=3, **MODES[target])
    chunkft.load_checkpoint(other, tmp_path / "saved.safetensors")
    train(model, optimizer, tiny_loss, range(5, 13))
    train(other_model, other, tiny_loss, range(5, 13))
    assert_same_weights(model, other_model)


def test_a_checkpoint_of_other_chunks_is_cut_anew_for_pages(tmp_path):
    model = tiny_net()
    optimizer = adamw(model, chunks=4)
    train(model, optimizer, tiny_loss, range(9))
    results = []
    for options in ({}, MODES["stream"], MODES["paged"]):
        other_model = tiny_net(seed=4)
        other_model.load_state_dict(model.state_dict())
        other = adamw(other_model, chunks=2, **options)
        other.load_state_dict(optimizer.state_dict())
        train(other_model, other, tiny_loss, range(9, 15))
        results.append(other_model)
    assert_same_weights(results[0], results[1])
    assert_same_weights(results[0], results[2])


@pytest.mark.parametrize("kind", MODES)
def test_a_refused_state_dict_changes_nothing(kind):
    model, untouched = tiny_net(), tiny_net()
    optimizer = adamw(model, chunks=3, **MODES[kind])
    twin = adamw(untouched, chunks=3, **MODES[kind])
    train(model, optimizer, tiny_loss, range(5))
    train(untouched, twin, tiny_loss, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    name = next(iter(saved["state"]))
    for entry in saved["state"][name]["ranges"]:
        entry["elementwise"] = ["of nothing"]
    with pytest.raises(ValueError, match="damaged"):
        optimizer.load_state_dict(saved)
    train(model, optimizer, tiny_loss, range(5, 9))
    train(untouched, twin, tiny_loss, range(5, 9))
    assert_same_weights(model, untouched)


def test_slots_bound_the_state_on_the_device_whatever_the_number_of_chunks():
    for chunks in (1, 2, 4):
        optimizer = adamw(tiny_net(), chunks=chunks, residency="stream", page_bytes=2048)
        assert optimizer.memory()["state_active"] <= 3 * 2048


def test_paging_by_chunk_holds_the_active_one_and_the_next():
    model = tiny_net()
    optimizer = adamw(model, chunks=4, state_device="paged")
    train(model, optimizer, tiny_loss, range(3))
    memory = optimizer.memory()
    padded = [sum(2 * -(-4 * piece.numel // 256) * 256 for piece in chunk.slices) for chunk in optimizer.plan]
    assert (
        max(padded) < memory["state_active"] <= 2 * max(padded)
    )  # two slots, less the padding of the one in use
    assert memory["state_host"] >= 8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", MODES)
def test_a_failing_base_optimizer_leaves_the_state_as_it_was(kind):
    class Failing(torch.optim.AdamW):
        fail = False

        def step(self, closure=None):
            if Failing.fail:
                raise RuntimeError("failed on purpose")
            return super().step(closure)

    model = mlp()
    optimizer = chunkft.ChunkOptimizer(model, Failing, chunks=1, interval=1, lr=1e-2, **MODES[kind])
    train(model, optimizer, mlp_loss, range(2))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    Failing.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        train(model, optimizer, mlp_loss, [2])
    Failing.fail = False
    optimizer.zero_grad()
    assert_same_state(optimizer.state_dict()["state"], before)
    train(model, optimizer, mlp_loss, range(3, 5))


@pytest.mark.parametrize("kind", MODES)
def test_optimizer_and_model_are_freed(kind):
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES[kind])
    train(model, optimizer, tiny_loss, range(3))
    gone = weakref.ref(optimizer), weakref.ref(model)
    del optimizer, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("kind", ["stream", "backward"])
def test_a_model_that_left_the_device_of_its_pages_is_named(kind):
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES[kind])
    train(model, optimizer, tiny_loss, range(2))
    elsewhere = torch.device("cuda:7")
    optimizer._store.pages = [dataclasses.replace(page, device=elsewhere) for page in optimizer._store.pages]
    with pytest.raises(RuntimeError, match=r"was on cuda:7 when the optimizer was built and is on cpu now"):
        optimizer.step()


@pytest.mark.parametrize("kind", MODES)
def test_a_load_that_the_system_fails_gives_the_model_back(kind, monkeypatch, tmp_path):
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES[kind])
    train(model, optimizer, tiny_loss, range(3))
    chunkft.save_checkpoint(optimizer, tmp_path / "saved.safetensors")
    before = copy.deepcopy(model.state_dict())

    def fail(self):
        raise OSError(errno.ENOMEM, "no memory for it")

    monkeypatch.setattr(PagedStore, "realise", fail)
    with pytest.raises(OSError, match="no memory for it") as caught:
        chunkft.load_checkpoint(optimizer, tmp_path / "saved.safetensors")
    assert "is detached; build a new one" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="after detach"):
        optimizer.step()
    monkeypatch.undo()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    again = adamw(model, chunks=2, **MODES[kind])
    chunkft.load_checkpoint(again, tmp_path / "saved.safetensors")
    assert again.updates == 3
