"""A state with a damaged value is refused before anything changes, or trains on with finite weights."""

import copy
import random

import pytest
import torch
from residencies import MODES, adamw
from torch import Tensor
from toy_models import assert_same_state, assert_same_weights, mlp, mlp_loss, through_file, weights

import chunkft

JUNK = [None, -1, 10**9, 1.5, float("nan"), "x", [], {}, True, torch.zeros(3), torch.tensor(-1.0), b"x", (1,)]
PLACES = {"host": {}, "paged": MODES["paged"], "stream": MODES["stream"]}


def trained(steps=5, **options):
    model = mlp()
    optimizer = adamw(model, chunks=3, **options)
    for number in range(steps):
        mlp_loss(model, number).backward()
        optimizer.step()
    return model, optimizer


def places(value, path=()):
    if path:
        yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


def holder_of(state, path):
    for key in path[:-1]:
        state = state[key]
    return state


def damages(value, rng):
    """Each kind of damage that a value can have, once."""
    yield "gone", None
    yield "junk", rng.choice(JUNK)
    if isinstance(value, Tensor):
        spoiled = value.clone()
        spoiled.view(-1)[rng.randrange(value.numel())] = float("nan")
        yield "NaN", spoiled
        yield "negative", value.abs().neg() - 1
        yield "infinite", torch.full_like(value, float("inf"))
        yield "shape", value.new_ones((*value.shape, 2))
        yield "dtype", value.to(torch.int64)
    elif isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, int | float):
        yield "off", value + 1
        yield "negative", -value - 1
    elif isinstance(value, list) and value:
        yield "twice", [*value, copy.deepcopy(value[0])]


def damaged(state, path, kind, value):
    result = copy.deepcopy(state)
    holder = holder_of(result, path)
    if kind == "gone":
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return result


@pytest.mark.parametrize("place", PLACES)
def test_every_entry_damaged_in_every_way_is_refused_whole_or_trains_on(place):
    rng = random.Random(7)
    _, source = trained(**PLACES[place])
    good = source.state_dict()
    model, optimizer = trained(3, **PLACES[place])
    before, known = optimizer.state_dict(), weights(model)
    refused = 0
    everywhere = [path for path in places(good) if rng.random() < 0.5 or path[0] == "param_groups"]
    for path in everywhere:
        for kind, value in damages(holder_of(good, path)[path[-1]], rng):
            if rng.random() < 0.5 and kind == "junk":
                continue
            bad = damaged(good, path, kind, value)
            try:
                optimizer.load_state_dict(bad)
            except ValueError:
                refused += 1
                continue
            for number in range(7):
                mlp_loss(model, number).backward()
                optimizer.step()
            assert all(bool(p.isfinite().all()) for p in model.parameters()), (path, kind, value)
            optimizer.state_dict()
            model.load_state_dict(known)
            optimizer.load_state_dict(before)
    assert_same_state(optimizer.state_dict(), before)
    assert_same_weights(model, known)
    assert refused > 50


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        ("step", lambda t: t.neg(), r"step = tensor\(-\d"),
        ("step", lambda t: t * float("nan"), r"step = tensor\(nan"),
        ("step", lambda t: t.expand(3).clone(), r"step = torch.float32 of shape \(3,\)"),
        ("exp_avg_sq", lambda t: t.neg() - 1, "exp_avg_sq = -.*needs numbers >= 0"),
        ("exp_avg", lambda t: t * float("nan"), "exp_avg = NaN"),
        ("exp_avg", lambda t: t + float("inf"), "exp_avg = inf"),
    ],
)
def test_message_names_parameter_key_and_value(key, change, told):
    _, source = trained()
    _, target = trained(0)
    before = target.state_dict()
    saved = source.state_dict()
    entry = saved["state"]["0.weight"]
    holder = entry["ranges"][0]["values"] if key == "step" else entry["tensors"]
    holder[key] = change(holder[key])
    with pytest.raises(ValueError, match=rf"'0\.weight.*{told}"):
        target.load_state_dict(saved)
    assert_same_state(target.state_dict(), before)


def test_file_with_a_damaged_moment_is_refused(tmp_path):
    _, source = trained()
    for state in source.state.values():
        state["exp_avg_sq"].neg_().sub_(1)
    _, target = trained(0)
    with pytest.raises(ValueError, match="exp_avg_sq"):
        through_file(source, target, tmp_path / "state")
    assert not target.state_dict()["state"]


@pytest.mark.parametrize(
    "base",
    [torch.optim.SGD, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Adadelta],
)
def test_undamaged_state_of_other_bases_loads(base):
    def build():
        model = mlp()
        more = {"momentum": 0.9} if base is torch.optim.SGD else {}
        return model, chunkft.ChunkOptimizer(model, base, chunks=3, interval=1, lr=1e-3, **more)

    model, optimizer = build()
    for number in range(4):
        mlp_loss(model, number).backward()
        optimizer.step()
    _, target = build()
    target.load_state_dict(optimizer.state_dict())
    assert_same_state(target.state_dict(), optimizer.state_dict())
