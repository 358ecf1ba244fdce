"""Loops that are not the usual one mean on ranks what they mean in one process."""

import pytest
import rigs
import torch
import torch.distributed as dist
from rank_fault_rigs import KINDS, batch, build, loss_of
from torch import nn

BACKWARD = {"residency": "stream", "update": "backward", "page_bytes": 600}


def whole(model):
    """All weights, gathered."""
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()
    ]


def assert_as_one_process(pool, loop, *args, world=2):
    """All ranks end with the weights of one process on what all of them see."""
    ((expected, told),) = pool.run(1, loop, "one", world, *args)
    for kind in KINDS:
        for found, said in pool.run(world, loop, kind, world, *args):
            assert said == pytest.approx(told, rel=1e-5), kind
            for value, other in zip(found, expected, strict=True):
                torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def shares(kind, group, world):
    """The ranks whose batches this process sees."""
    return range(world) if kind == "one" else [dist.get_rank(group)]


def by_parts(group, kind, world, scaled):
    """The model itself is never called; its gradients are clipped, or scaled."""
    model, optimizer = build(kind, None if kind == "one" else group, chunks=1)
    head, tail = (lambda x: model[2](model[1](model[0](x)))), (lambda x: model[4](model[3](x)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    norms = []
    for step in range(4):
        for rank in shares(kind, group, world):
            loss = tail(head(batch(step, rank))).square().mean()
            scaler.scale(loss / (world if kind == "one" else 1)).backward()
        if scaled:
            scaler.unscale_(optimizer)
        else:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return whole(model), norms


@pytest.mark.parametrize("scaled", [False, True], ids=["clipped", "scaled"])
def test_parts_of_a_model_may_be_called_in_its_place(pool, scaled):
    assert_as_one_process(pool, by_parts, scaled)


def moves(group, kind, world):
    """Weights get other memory between steps, or are replaced."""
    model, optimizer = build(
        kind, None if kind == "one" else group, chunks=1, **({} if kind == "one" else BACKWARD)
    )
    for step in range(4):
        for rank in shares(kind, group, world):
            (loss_of(model, step, rank) / (world if kind == "one" else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if kind == "replicas" and step == 1:
            for weight in model.parameters():
                weight.data = weight.data.clone()
        if kind == "replicas" and step == 2:
            model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    return whole(model), []


def test_weights_that_moved_are_updated_in_the_next_backward_pass(pool):
    assert_as_one_process(pool, moves)


def penalised(group, kind, world):
    """Gradients of inputs are asked for before the backward pass."""
    model, optimizer = build(
        kind, None if kind == "one" else group, chunks=1, **({} if kind == "one" else BACKWARD)
    )
    sizes = []
    for step in range(3):
        for rank in shares(kind, group, world):
            x = batch(step, rank).requires_grad_()
            loss = model(x).square().mean()
            (found,) = torch.autograd.grad(loss, x, retain_graph=True)
            sizes.append(float(found.norm()) if rank == 0 else 0.0)
            (loss / (world if kind == "one" else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model), [sum(sizes)] if shares(kind, group, world)[0] == 0 else []


def test_gradients_of_inputs_are_no_backward_pass_of_a_step(pool):
    expected, _ = pool.run(1, penalised, "one", 2)[0]
    for found, _ in pool.run(2, penalised, "replicas", 2):
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def freezes(group, kind, options):
    """Which weights a step changes while a weight is frozen that was active, and after that."""
    model, optimizer = build(kind, group, chunks=1, **options)
    changed = []
    for step in range(6):
        if step in (2, 4):
            model[2].weight.requires_grad_(step == 4)
        before = whole(model)
        loss_of(model, step, dist.get_rank(group)).backward()
        optimizer.step()
        changed.append([not torch.equal(a, b) for a, b in zip(before, whole(model), strict=True)])
    return changed


@pytest.mark.parametrize("options", [{}, BACKWARD], ids=["step", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_active_weight_is_frozen_and_trained_again(pool, kind, options):
    names = [name for name, _ in build(kind, None)[0].named_parameters()]
    frozen = [name != "2.weight" for name in names]
    for changed in pool.run(2, freezes, kind, options):
        assert changed[:2] == changed[4:] == [[True] * len(names)] * 2
        assert changed[2:4] == [frozen] * 2


def halves(group, kind):
    """``weight.grad /= 2``, which Python gives back to the weight."""
    model, optimizer = build(kind, group, chunks=1)
    for step in range(3):
        loss_of(model, step, dist.get_rank(group)).backward()
        for weight in model.parameters():
            weight.grad /= 2
            held = weight.grad
            held.norm()
            weight.grad = held
        optimizer.step()
    return rigs.digest(model)


def scaled_in_place(group, kind):
    """The same by a method."""
    model, optimizer = build(kind, group, chunks=1)
    for step in range(3):
        loss_of(model, step, dist.get_rank(group)).backward()
        for weight in model.parameters():
            weight.grad.mul_(0.5)
        optimizer.step()
    return rigs.digest(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_given_back_to_its_weight_is_nothing_new(pool, kind):
    assert pool.run(2, halves, kind) == pool.run(2, scaled_in_place, kind)


def crossed(group, crosses):
    """Two models of one shape; one rank runs them in another order."""
    pairs = [build("replicas", group, chunks=1) for _ in range(2)]
    order = pairs[::-1] if crosses and dist.get_rank(group) else pairs
    try:
        for model, _ in order:
            loss_of(model, 0, dist.get_rank(group)).backward()
        for _, optimizer in pairs:
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_optimizers_that_ranks_use_in_another_order_are_told_apart(pool):
    assert pool.run(2, crossed, False) == ["", ""]
    for message in pool.run(2, crossed, True):
        assert "differs from rank 0 in which optimizer of the process it is" in message


def odd_options(group):
    """A group gets options that have no value of their own."""
    model, optimizer = build("replicas", group, interval=1)
    rank = dist.get_rank(group)
    odd = [object() for _ in range(rank + 1)][-1]
    optimizer.param_groups[0] |= {"tag": odd, "names": set("abcdef"[:: 1 - 2 * rank]), "note": lambda: rank}
    for step in range(2):
        loss_of(model, step, rank).backward()
        optimizer.step()
    return optimizer.updates


def test_group_options_without_a_value_are_alike_on_all_ranks(pool):
    assert pool.run(2, odd_options) == [2, 2]
