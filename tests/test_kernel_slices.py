"""ChunkAdamW through the AdamW kernel, as on a GPU, is ChunkAdamW through torch.optim.AdamW, bit for bit."""

import pytest
import torch
from toy_models import assert_same_state, assert_same_weights, mlp, mlp_loss, tiny_loss, tiny_net, train

import chunkft
from chunkft.optim import kernel_slices

RESIDENCIES = {
    "host": {},
    "device": {"state_device": "device"},
    "paged": {"state_device": "paged"},
    "stream": {"residency": "stream", "page_bytes": 1024},
    "backward": {"residency": "stream", "page_bytes": 1024, "update": "backward"},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the kernel's path, whose CPU backend is the same arithmetic in PyTorch."""
    calls = []

    def on_gpu(leaf):
        calls.append(leaf)
        return True

    monkeypatch.setattr(kernel_slices, "_on_gpu", on_gpu)
    return calls


def run(model, loss, steps, plan=None, **options):
    chosen = {"chunks": 3} if plan is None else {"chunks": None, "partition": plan}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, weight_decay=0.1, interval=2, **chosen, **options)
    train(model, optimizer, loss, steps)
    return optimizer


@pytest.mark.parametrize("keep_state", [True, False])
@pytest.mark.parametrize("master", ["none", "fp32", "residual", "stochastic"])
@pytest.mark.parametrize("kind", RESIDENCIES)
def test_sweeps_are_those_of_torch(kind, master, keep_state, as_on_a_gpu, monkeypatch):
    options = {"master": master, "keep_state": keep_state, "always_active": ["norm.*"]}
    # Without a master, torch computes 16-bit weights in 16 bits, the kernel in fp32 that it rounds once.
    dtype = torch.float32 if master == "none" else torch.bfloat16
    model, plain_model = tiny_net(dtype=dtype), tiny_net(dtype=dtype)
    ours = run(model, tiny_loss, range(14), **options, **RESIDENCIES[kind])
    assert as_on_a_gpu
    monkeypatch.setattr(kernel_slices, "_on_gpu", lambda leaf: False)
    plan = ours.plan
    del options["always_active"]
    plain = run(plain_model, tiny_loss, range(14), plan, **options)
    assert_same_weights(model, plain_model)
    assert_same_state(sorted_keys(ours.state_dict()["state"]), sorted_keys(plain.state_dict()["state"]))


def sorted_keys(value):
    """Dicts in the order of their keys: which tensor comes first is no property of the state."""
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [sorted_keys(entry) for entry in value]
    return value


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_goes_from_one_implementation_to_the_other(first, monkeypatch):
    model = mlp()
    monkeypatch.setattr(kernel_slices, "_on_gpu", lambda leaf: first)
    source = run(model, mlp_loss, range(5), max_grad_norm=0.5)
    other_model = mlp(seed=3)
    other_model.load_state_dict(model.state_dict())
    monkeypatch.setattr(kernel_slices, "_on_gpu", lambda leaf: not first)
    target = run(other_model, mlp_loss, (), max_grad_norm=0.5)
    target.load_state_dict(source.state_dict())
    train(other_model, target, mlp_loss, range(5, 9))
    monkeypatch.setattr(kernel_slices, "_on_gpu", lambda leaf: first)
    train(model, source, mlp_loss, range(5, 9))
    assert_same_weights(model, other_model)


def test_the_state_is_shown_as_torch_shows_it(as_on_a_gpu):
    model = mlp()
    optimizer = run(model, mlp_loss, range(1))
    for _, leaf in optimizer.active_parameters():
        assert set(optimizer.state[leaf]) == {"step", "exp_avg", "exp_avg_sq"}
        assert float(optimizer.state[leaf]["step"]) == 1.0
    moments = sum(leaf.numel() * 8 for _, leaf in optimizer.active_parameters())
    assert optimizer.memory()["state_active"] == moments


@pytest.mark.parametrize("name", ["fused", "foreach"])
def test_a_named_implementation_is_used(name, as_on_a_gpu):
    """What the user asked for by name is torch's own."""
    model, dense_model = mlp(), mlp()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, **{name: True})
    dense = torch.optim.AdamW(dense_model.parameters(), lr=1e-2, **{name: True})
    train(model, optimizer, mlp_loss, range(4))
    train(dense_model, dense, mlp_loss, range(4))
    assert_same_weights(model, dense_model)
    assert not as_on_a_gpu


def test_other_optimizers_are_left_alone(as_on_a_gpu):
    model, dense_model = mlp(), mlp()
    optimizer = chunkft.ChunkOptimizer(model, torch.optim.SGD, chunks=1, lr=0.1, momentum=0.9)
    dense = torch.optim.SGD(dense_model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, mlp_loss, range(4))
    train(dense_model, dense, mlp_loss, range(4))
    assert_same_weights(model, dense_model)
    assert not as_on_a_gpu


def test_the_device_decides_about_gradients_that_are_not_finite(as_on_a_gpu):
    """In the backward pass nobody waits for the check: below the first NaN nothing changes, step counts included."""
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, **RESIDENCIES["backward"])
    train(model, optimizer, tiny_loss, range(2))
    table, head = model.table.weight.detach().clone(), model.head.weight.detach().clone()
    hook = model.blocks[0].register_full_backward_hook(lambda *_: (torch.full((6, 7, 11), float("nan")),))
    tiny_loss(model, 2).backward()
    hook.remove()
    optimizer.step()
    assert torch.equal(model.table.weight, table)
    assert not torch.equal(model.head.weight, head)
    assert (optimizer.updates, optimizer.skipped) == (2, 1)
    counts = {
        name: {float(entry["values"].get("step", -1)) for entry in state["ranges"]}
        for name, state in optimizer.state_dict()["state"].items()
    }
    assert counts["table.weight"] == {2.0}
    assert counts["head.weight"] == {3.0}
    train(model, optimizer, tiny_loss, range(3, 5))
    assert optimizer.updates == 4


def test_new_state_is_made_in_the_slot_itself(as_on_a_gpu):
    """On the first visit of a chunk its state does not exist twice on the device."""
    model = mlp()
    optimizer = run(model, mlp_loss, range(1), state_device="paged")
    slots = {t.untyped_storage().data_ptr() for t in optimizer._store._open.values()}
    for _, leaf in optimizer.active_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[leaf][key].untyped_storage().data_ptr() in slots


@pytest.mark.parametrize("kind", RESIDENCIES)
def test_a_bf16_first_moment_is_kept_paged_and_saved_in_16_bits(kind, tmp_path):
    model, exact_model = tiny_net(), tiny_net()
    short = run(model, tiny_loss, range(12), first_moment="bf16", **RESIDENCIES[kind])
    exact = run(exact_model, tiny_loss, range(12), short.plan)
    state = short.state_dict()["state"]
    assert {entry["tensors"]["exp_avg"].dtype for entry in state.values()} == {torch.bfloat16}
    assert {entry["tensors"]["exp_avg_sq"].dtype for entry in state.values()} == {torch.float32}
    for name, entry in exact.state_dict()["state"].items():
        kept, true = state[name]["tensors"]["exp_avg"].float(), entry["tensors"]["exp_avg"]
        # Roundings of 2^-8 and less add up to at most their number times that; the weights part a little as well.
        assert (kept - true).abs().max() <= 12 * 2**-8 * true.abs().max() + 1e-6

    chunkft.save_checkpoint(short, tmp_path / "saved.safetensors")
    other_model = tiny_net(seed=7)
    other_model.load_state_dict(model.state_dict())
    other = run(other_model, tiny_loss, (), first_moment="bf16", **RESIDENCIES[kind])
    chunkft.load_checkpoint(other, tmp_path / "saved.safetensors")
    train(model, short, tiny_loss, range(12, 18))
    train(other_model, other, tiny_loss, range(12, 18))
    assert_same_weights(model, other_model)


def test_a_bf16_first_moment_takes_6_bytes_of_8():
    model = mlp()
    full = run(model, mlp_loss, range(3)).memory()["state_active"]
    short = run(mlp(), mlp_loss, range(3), first_moment="bf16").memory()["state_active"]
    assert short == full * 6 // 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_moment": "fp8"}, r"first_moment='fp8' .*'fp32' and 'bf16'"),
        ({"first_moment": "bf16", "fused": True}, r"first_moment='bf16' .*fused=True"),
    ],
)
def test_first_moments_that_cannot_be(options, words):
    model = mlp()
    with pytest.raises(ValueError, match=words):
        chunkft.ChunkAdamW(model, chunks=2, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "_chunkft")


def test_a_bf16_first_moment_leaves_no_option_of_a_group_unheard():
    model = mlp()
    chunkft.attach(model)
    groups = [{"params": list(model.parameters()), "amsgrad": True}]
    with pytest.raises(ValueError, match=r"first_moment='bf16' .*amsgrad=True in parameter group 0"):
        chunkft.ChunkAdamW(groups, chunks=2, first_moment="bf16")
