"""Training with paged state is bit for bit the training without: every residency, tier and base optimizer."""

import copy
import dataclasses
import errno
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from toy_models import (
    WAYS,
    assert_same_state,
    assert_same_weights,
    mlp,
    mlp_loss,
    tiny_llama,
    tiny_loss,
    tiny_net,
    train,
)

import chunkft
from chunkft.optim.paged import PagedStore

PAGE = 1024
MODES = {
    "paged": {"state_device": "paged"},
    "stream": {"residency": "stream", "page_bytes": PAGE},
    "backward": {"residency": "stream", "page_bytes": PAGE, "update": "backward"},
    "one-page-a-slice": {"residency": "stream", "page_bytes": 1},
}
FILES = {
    "paged-files": {"state_device": "paged"},
    "stream-files": {"residency": "stream", "page_bytes": PAGE},
    "backward-files": {"residency": "stream", "page_bytes": PAGE, "update": "backward"},
}


@pytest.fixture(params=[*MODES, *FILES])
def mode(request, tmp_path):
    if request.param in FILES:
        return {**FILES[request.param], "state_dir": tmp_path / "state"}
    return dict(MODES[request.param])


def in_memory(model, plan, build, **options):
    """The same training without paging, on the same slices."""
    return build(model, chunks=None, partition=plan, **options)


def adamw(model, **options):
    return chunkft.ChunkAdamW(model, **{"lr": 1e-2, "interval": 2, **options})


def tiny_llama_loss(model, number):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 53, (2, 9), generator=generator)
    return model(input_ids=ids, labels=ids).loss


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
    train(model, optimizer, tiny_llama_loss, range(5))
    train(dense_model, dense, tiny_llama_loss, range(5))
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


def test_gradients_of_the_chunk_never_exist_together():
    """With update="backward" the gradient of a page is gone before that of the next but one is complete."""
    model = tiny_llama()
    optimizer = adamw(model, chunks=1, residency="stream", page_bytes=2048, update="backward")
    seen = []

    def count(_):
        seen.append(
            sum(leaf.grad.nbytes for _, leaf in optimizer.active_parameters() if leaf.grad is not None)
        )

    for _, leaf in optimizer.active_parameters():
        leaf.register_post_accumulate_grad_hook(count)
    tiny_llama_loss(model, 0).backward()
    total = sum(leaf.nbytes for _, leaf in optimizer.active_parameters())
    largest = max(leaf.nbytes for _, leaf in optimizer.active_parameters())
    assert seen
    assert max(seen) <= max(2048, 2 * largest) < total / 2
    assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())


def test_a_second_backward_before_step_is_refused():
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES["backward"])
    tiny_loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"second backward pass.*accumulate.*update='step'"):
        tiny_loss(model, 1).backward()
    optimizer.zero_grad()
    tiny_loss(model, 2).backward()
    optimizer.step()
    assert optimizer.updates == 1


def test_state_dict_between_backward_and_step_is_refused(tmp_path):
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES["backward"])
    tiny_loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) between backward\(\) and step\(\)"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"between backward\(\) and step\(\)"):
        chunkft.save_checkpoint(optimizer, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())
    optimizer.step()
    assert optimizer.state_dict()["cursor"]["updates"] == 1


def test_a_non_finite_gradient_drops_what_is_left_of_the_step():
    model = tiny_net()
    optimizer = adamw(model, chunks=1, **MODES["backward"])
    train(model, optimizer, tiny_loss, range(2))
    table = model.table.weight.detach().clone()
    head = model.head.weight.detach().clone()
    hook = model.blocks[0].register_full_backward_hook(lambda *_: (torch.full((6, 7, 11), float("nan")),))
    tiny_loss(model, 2).backward()
    hook.remove()
    optimizer.step()
    assert torch.equal(model.table.weight, table)  # below the hook: dropped
    assert not torch.equal(model.head.weight, head)  # above: updated before the hook ran
    assert (optimizer.updates, optimizer.skipped, optimizer.interval_position) == (2, 1, 0)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    train(model, optimizer, tiny_loss, range(3, 5))
    assert optimizer.updates == 4


def test_a_weight_that_grows_after_its_update_is_named():
    model = tiny_net()
    optimizer = adamw(model, chunks=1, residency="stream", page_bytes=1 << 20, update="backward")
    ids = torch.zeros(2, 3, dtype=torch.long)
    F.cross_entropy(model(ids), torch.tensor([0, 1])).backward()
    _, leaf = next(iter(optimizer.active_parameters()))
    leaf.grad = torch.zeros_like(leaf)
    with pytest.raises(RuntimeError, match=r"table.weight.*grew after.*update='step'"):
        optimizer.step()
    assert leaf.grad is None


def test_a_weight_that_is_read_without_its_module_is_updated_in_step():
    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = torch.nn.Linear(5, 7)
            self.last = torch.nn.Linear(7, 3)

        def forward(self, x):
            return F.linear(torch.relu(self.first(x)), self.last.weight, self.last.bias)

    def loss(model, number):
        return model(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).pow(2).sum()

    model, plain_model = Functional(), Functional()
    paged = adamw(model, chunks=2, **MODES["backward"])
    plain = in_memory(plain_model, paged.plan, adamw)
    with pytest.warns(UserWarning, match=r"last\.weight.*used without a call"):
        train(model, paged, loss, range(6))
    with pytest.warns(UserWarning, match=r"last\.weight.*used without a call"):
        train(plain_model, plain, loss, range(6))
    assert_same_weights(model, plain_model)


def test_an_exception_in_the_middle_of_a_backward_pass_leaves_a_usable_optimizer():
    model = tiny_net()
    optimizer = adamw(model, chunks=1, **MODES["backward"])
    train(model, optimizer, tiny_loss, range(2))

    def fail(*_):
        raise MemoryError("in the middle")

    hook = model.blocks[0].register_full_backward_hook(fail)
    with pytest.raises(MemoryError, match="in the middle"):
        tiny_loss(model, 2).backward()
    hook.remove()
    optimizer.zero_grad()
    train(model, optimizer, tiny_loss, range(3, 6))
    assert optimizer.updates == 5
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


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


def test_two_processes_cannot_update_in_backward(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = tiny_net()
    with pytest.raises(RuntimeError, match=r"update='backward' works in one process, got world_size=2"):
        adamw(model, chunks=2, **MODES["backward"])
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_without_state_frees_each_gradient_in_the_backward_pass():
    """Slices without a page do not wait for each other."""
    model = tiny_llama()
    optimizer = chunkft.ChunkOptimizer(
        model, torch.optim.SGD, chunks=1, lr=0.1, residency="stream", page_bytes=1 << 20, update="backward"
    )
    tiny_llama_loss(model, 0).backward()
    leaves = [leaf for _, leaf in optimizer.active_parameters()]
    assert 0 < optimizer.memory()["gradients"] <= 2 * max(leaf.nbytes for leaf in leaves)
    assert optimizer.memory()["gradients"] < sum(leaf.nbytes for leaf in leaves) / 2


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
