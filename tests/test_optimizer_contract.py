"""The contract of torch.optim.Optimizer: schedulers, scalers, hooks, closures, groups, and any base optimizer."""

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from toy_models import (
    assert_same_state,
    assert_same_weights,
    mlp,
    mlp_loss,
    tiny_loss,
    tiny_net,
    train,
    weights,
)

import chunkft

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8, 1e-5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 3, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [1e-2, 3e-2], total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.8)], [5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-4, 4),
}


def test_no_scheduler_of_torch_is_left_out():
    known = {
        name
        for name, found in vars(lr_scheduler).items()
        if inspect.isclass(found) and issubclass(found, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    untested = known - set(SCHEDULERS) - {"LRScheduler"}
    for name in untested:  # newer than this list: at least its constructor has to take the optimizer
        getattr(lr_scheduler, name)(chunkft.ChunkAdamW(mlp(), chunks=2))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_draw_the_curve_they_draw_for_adamw(name, chunks, tensor_lr):
    def groups(model):
        parameters = list(model.parameters())
        return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": rate(3e-3)}]

    def rate(value):
        return torch.tensor(value) if tensor_lr else value

    plain, chunked = mlp(), mlp()
    chunkft.attach(chunked)
    reference = torch.optim.AdamW(groups(plain), lr=rate(1e-3))
    optimizer = chunkft.ChunkAdamW(groups(chunked), lr=rate(1e-3), chunks=chunks, interval=2)
    keep = [id(group) for group in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The epoch parameter")
        schedulers = [SCHEDULERS[name](o) for o in (reference, optimizer)]
        for step in range(12):
            for m, o, scheduler in zip((plain, chunked), (reference, optimizer), schedulers, strict=True):
                train(m, o, mlp_loss, [step])
                if name == "ReduceLROnPlateau":
                    scheduler.step(1.0)
                else:
                    scheduler.step()
            for a, b in zip(reference.param_groups, optimizer.param_groups, strict=True):
                assert float(a["lr"]) == float(b["lr"])
                assert a["betas"] == b["betas"]
            if chunks == 1:
                assert_same_weights(plain, chunked)
    assert [id(group) for group in optimizer.param_groups] == keep


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("zero", ["optimizer", "model"])
def test_grad_scaler_skips_what_it_skips_for_adamw(unscale, zero):
    plain, chunked = tiny_net(), tiny_net()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1, interval=50)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in range(2)]
    for step in range(10):
        before, position = weights(chunked), optimizer.interval_position
        state = optimizer.state_dict()
        for m, o, scaler in zip((plain, chunked), (reference, optimizer), scalers, strict=True):
            scaler.scale(tiny_loss(m, step) * (math.inf if step in (3, 4, 8) else 1.0)).backward()
            if unscale:
                scaler.unscale_(o)
                nn.utils.clip_grad_norm_([p for group in o.param_groups for p in group["params"]], 0.1)
            scaler.step(o)
            scaler.update()
            (o if zero == "optimizer" or o is reference else m).zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same_weights(plain, chunked)
        assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())
        if step in (3, 4, 8):
            state["cursor"]["skipped"] += 1
            assert_same_state(optimizer.state_dict(), state)
            assert_same_weights(chunked, before)
            assert optimizer.interval_position == position
    assert (optimizer.updates, optimizer.skipped) == (7, 3)


def test_grad_scaler_with_several_chunks_stays_in_the_interval():
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    active = []
    for step in range(9):
        scaler.scale(tiny_loss(model, step) * (math.nan if step % 3 == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        active.append(optimizer.active)
    assert active == [0, 0, 1, 1, 1, 2, 2, 2, 0]


def test_grad_scaler_refuses_half_precision_weights():
    model = tiny_net(dtype=torch.float16)
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _, leaf in optimizer.active_parameters():
        leaf.grad = torch.ones_like(leaf)
    before = weights(model)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="float16"):
        scaler.step(optimizer)
    assert_same_weights(model, before)


def test_profiler_sees_the_step():
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, mlp_loss, range(2))
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["Optimizer.step#ChunkAdamW.step"] == 2


def test_hooks_run_in_order_and_may_replace_what_is_saved():
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o, o.updates)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o, o.updates)))
    train(model, optimizer, mlp_loss, range(2))
    assert calls == [
        ("pre", optimizer, 0),
        ("post", optimizer, 1),
        ("pre", optimizer, 1),
        ("post", optimizer, 2),
    ]
    calls.clear()
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": "mine"})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(state.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert calls == ["saving", "mine", "loaded"]
    assert state["note"] == "mine"


def test_closures_compute_the_loss_with_gradients_and_return_it():
    plain, chunked = mlp(), mlp()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1)
    for step in range(4):
        losses = []
        for m, o in ((plain, reference), (chunked, optimizer)):

            def closure(m=m, o=o, step=step):
                o.zero_grad()
                loss = mlp_loss(m, step)
                loss.backward()
                return loss

            losses.append(o.step(closure))
        assert torch.equal(losses[0], losses[1])
        assert_same_weights(plain, chunked)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_leaves(set_to_none):
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3)
    tiny_loss(model, 0).backward()
    assert any(leaf.grad.abs().sum() > 0 for _, leaf in optimizer.active_parameters())
    optimizer.zero_grad(set_to_none=set_to_none)
    for _, leaf in optimizer.active_parameters():
        assert leaf.grad is None if set_to_none else not leaf.grad.any()


def test_groups_hold_the_active_leaves_in_stream_order_and_keep_their_values():
    model = tiny_net()
    chunkft.attach(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    names = {id(p): name for name, p in model.named_parameters()}
    members = [{names[id(p)] for p in matrices}, {names[id(p)] for p in vectors}]
    optimizer = chunkft.ChunkAdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": iter(vectors), "lr": 7e-3, "tag": "v"}],
        chunks=4,
        interval=1,
    )
    dicts = list(optimizer.param_groups)
    for step in range(9):
        pairs = list(optimizer.active_parameters())
        for group, allowed in zip(optimizer.param_groups, members, strict=True):
            expected = [leaf for piece, leaf in pairs if piece.name in allowed]
            assert [id(p) for p in group["params"]] == [id(leaf) for leaf in expected]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(pairs)
        train(model, optimizer, tiny_loss, [step])
    assert all(a is b for a, b in zip(dicts, optimizer.param_groups, strict=True))
    assert [g["weight_decay"] for g in dicts] == [0.5, 0.01]
    assert [g["lr"] for g in dicts] == [1e-3, 7e-3]
    assert dicts[1]["tag"] == "v"


def test_a_learning_rate_set_by_hand_takes_effect_at_the_next_step():
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=2, weight_decay=0.0)
    train(model, optimizer, tiny_loss, range(1))
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(model, optimizer, tiny_loss, range(1, 6))
    assert_same_weights(model, before)
    optimizer.param_groups[0]["lr"] = 1e-3
    train(model, optimizer, tiny_loss, range(1))
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_state_shows_the_active_leaves_only():
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    assert not optimizer.state
    train(model, optimizer, tiny_loss, range(3))
    leaves = [leaf for _, leaf in optimizer.active_parameters()]
    assert {id(key) for key in optimizer.state} == {id(leaf) for leaf in leaves}
    for leaf in leaves:
        assert optimizer.state[leaf]["exp_avg"].shape == leaf.shape
        assert float(optimizer.state[leaf]["step"]) == 1


def test_parameters_cannot_be_added_later():
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    with pytest.raises(RuntimeError, match="plan is fixed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_and_pickles_are_refused_with_what_to_do_instead(how):
    optimizer = chunkft.ChunkAdamW(mlp(), chunks=2)
    with pytest.raises(TypeError, match=r"ChunkAdamW cannot be copied or pickled.*state_dict\(\)"):
        how(optimizer)
    assert "ChunkAdamW" in repr(optimizer)
