"""Bad arguments: an error that names argument, value and what is allowed, and a model that is as it was."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from toy_models import assert_same_weights, mlp, mlp_loss, tiny_loss, tiny_net, train, weights

import chunkft

NAN = math.nan

# arguments of ChunkAdamW on TinyNet, and what the error has to say
ADAMW = [
    ({"chunks": 0}, r"chunks=0 .*integer >= 1"),
    ({"chunks": -3}, r"chunks=-3 .*integer >= 1"),
    ({"chunks": True}, r"chunks=True .*integer >= 1"),
    ({"chunks": 2.0}, r"chunks=2.0 .*integer >= 1"),
    ({"chunks": "4"}, r"chunks='4' .*integer >= 1"),
    ({"chunks": None}, r"chunks=None .*integer >= 1"),
    ({"chunks": 10_000}, r"chunks=10000 .*1 <= chunks <= \d+"),
    ({"chunks": 10_000, "partition": "interleaved"}, r"chunks=10000 .*1 <= chunks <= \d+"),
    ({"chunks": 10_000, "partition": "layers"}, r"chunks=10000 .*1 <= chunks <= \d+"),
    ({"interval": 0}, r"interval=0 .*integer >= 1"),
    ({"interval": 2.5}, r"interval=2.5 .*integer >= 1"),
    ({"interval": True}, r"interval=True .*integer >= 1"),
    ({"interval": None}, r"interval=None .*integer >= 1"),
    ({"partition": "rows"}, r"partition='rows' .*'bytes', 'layers', 'interleaved'"),
    ({"partition": 3}, r"partition must be one of 'bytes'.*got 3"),
    ({"partition": []}, r"partition must be.*got \[\]"),
    (
        {"partition": [["nothing*"], ["*"]], "chunks": 2},
        r"group 0: 'nothing\*' matches no trainable parameter",
    ),
    ({"partition": [["table.weight"]], "chunks": 1}, r"plan leaves out 'blocks"),
    ({"partition": [["*"], ["table.weight"]], "chunks": 2}, r"covers 'table.weight' .* twice"),
    ({"partition": [["*"]], "chunks": 2}, r"chunks=2 disagrees with the partition, which has 1"),
    ({"schedule": "sequential"}, r"schedule='sequential' .*'cyclic', 'reverse', 'random'"),
    ({"schedule": None}, r"schedule=None .*'cyclic', 'reverse', 'random'"),
    ({"schedule": lambda n, k: k}, r"schedule returned 3 for interval 0; needs .* 0 <= chunk < 3"),
    ({"schedule": lambda n, k: "first"}, r"schedule returned 'first' for interval 0"),
    ({"slice_dim": 2}, r"slice_dim=2 .*0 \(rows\) or 1 \(columns\)"),
    ({"slice_dim": None}, r"slice_dim=None .*0 \(rows\) or 1 \(columns\)"),
    ({"always_active": "nothing*"}, r"always_active='nothing\*' matches no trainable parameter"),
    ({"always_active": ["head.weight", ""]}, r"always_active='' matches no trainable parameter"),
    ({"always_active": "*"}, r"always_active='\*' takes every trainable parameter"),
    ({"keep_state": "yes"}, r"keep_state='yes' .*True or False"),
    ({"max_grad_norm": 0}, r"max_grad_norm=0 .*number > 0, or None"),
    ({"max_grad_norm": -1.0}, r"max_grad_norm=-1.0 .*number > 0, or None"),
    ({"max_grad_norm": NAN}, r"max_grad_norm=nan .*number > 0, or None"),
    ({"max_grad_norm": "1"}, r"max_grad_norm='1' .*number > 0, or None"),
    ({"max_grad_norm": True}, r"max_grad_norm=True .*number > 0, or None"),
    ({"master": "bf16"}, r"master='bf16' .*'auto', 'fp32', 'residual', 'stochastic', 'none'"),
    ({"master": None}, r"master=None .*'auto', 'fp32', 'residual', 'stochastic', 'none'"),
    ({"state_device": "cuda"}, r"state_device='cuda' .*'auto', 'host', 'paged', 'device'"),
    ({"residency": "slot"}, r"residency='slot' .*'chunk', 'stream'"),
    ({"residency": "stream", "state_device": "host"}, r"residency='stream' .*state_device='host'.*'paged'"),
    ({"state_dir": "here", "state_device": "device"}, r"state_dir='here' .*state_device='device'.*'paged'"),
    ({"state_dir": ""}, r"state_dir='' .*path of a directory"),
    ({"page_bytes": 0, "residency": "stream"}, r"page_bytes=0 .*>= 1"),
    ({"page_bytes": 1.5, "residency": "stream"}, r"page_bytes=1.5 .*integer"),
    ({"update": "never"}, r"update='never' .*'step', 'backward'"),
    ({"update": "backward"}, r"update='backward' needs residency='stream'"),
    (
        {"update": "backward", "residency": "stream", "max_grad_norm": 1.0},
        r"max_grad_norm=1.0 .*update='backward'",
    ),
    ({"seed": 1.5}, r"seed=1.5 .*integer"),
    ({"seed": None}, r"seed=None .*integer"),
    ({"lr": NAN}, r"lr=nan .*finite number >= 0"),
    ({"lr": math.inf}, r"lr=inf .*finite number >= 0"),
    ({"lr": -1e-3}, r"lr=-0.001 .*finite number >= 0"),
    ({"lr": "1e-3"}, r"lr='1e-3' .*finite number >= 0"),
    ({"lr": None}, r"lr=None .*finite number >= 0"),
    ({"lr": torch.tensor(NAN)}, r"lr=tensor\(nan\) .*finite number >= 0"),
    ({"lr": torch.tensor([1.0, 2.0])}, r"lr=tensor\(\[1., 2.\]\) .*finite number >= 0"),
    ({"weight_decay": -0.1}, r"weight_decay=-0.1 .*finite number >= 0"),
    ({"weight_decay": NAN}, r"weight_decay=nan .*finite number >= 0"),
    ({"weight_decay": None}, r"weight_decay=None .*finite number >= 0"),
    ({"eps": -1e-8}, r"eps=-1e-08 .*finite number >= 0"),
    ({"eps": NAN}, r"eps=nan .*finite number >= 0"),
    ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) .*0 <= beta < 1"),
    ({"betas": (-0.1, 0.9)}, r"betas=\(-0.1, 0.9\) .*0 <= beta < 1"),
    ({"betas": (NAN, 0.9)}, r"betas=\(nan, 0.9\) .*0 <= beta < 1"),
    ({"betas": 0.9}, r"betas=0.9 .*two numbers"),
    ({"betas": (0.9,)}, r"betas=\(0.9,\) .*two numbers"),
    ({"betas": None}, r"betas=None .*two numbers"),
]


def snapshot(model):
    return (
        weights(model),
        [(name, p.requires_grad, p.grad is None, id(p)) for name, p in model.named_parameters()],
        [sorted(module.__dict__) for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert_same_weights(after[0], before[0])
    assert after[1:] == before[1:]


def identify(case):
    return "-".join(f"{key}={value!r:.24}" for key, value in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("options", "match"), ADAMW, ids=identify)
@pytest.mark.parametrize("attached", [False, True])
def test_adamw_refuses_and_leaves_the_model_as_it_was(options, match, attached):
    model = tiny_net()
    model.norm.bias.requires_grad_(False)
    if attached:
        chunkft.attach(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        chunkft.ChunkAdamW(model, **{"chunks": 3, **options})
    assert_untouched(model, before)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    train(model, optimizer, tiny_loss, range(4))
    assert all(not torch.equal(p, before[0][n]) for n, p in model.named_parameters() if n != "norm.bias")


OF_PARTITION = {"chunks", "partition", "slice_dim", "always_active"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *((options, match) for options, match in ADAMW if set(options) <= OF_PARTITION),
        ({"row_multiple": 0}, r"row_multiple=0 .*integer >= 1"),
        ({"row_multiple": True}, r"row_multiple=True .*integer >= 1"),
        ({"row_multiple": 1.5}, r"row_multiple=1.5 .*integer >= 1"),
    ],
    ids=identify,
)
def test_partition_refuses_the_same(options, match):
    model = tiny_net()
    before = snapshot(model)
    options = {"by" if key == "partition" else key: value for key, value in {"chunks": 3, **options}.items()}
    with pytest.raises(ValueError, match=match):
        chunkft.partition(model, **options)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("base", "options", "kind", "match"),
    [
        (torch.optim.LBFGS, {"lr": 0.1}, ValueError, "base=LBFGS cannot be used"),
        (chunkft.ChunkAdamW, {"lr": 0.1}, ValueError, "base=ChunkAdamW cannot be used"),
        ("AdamW", {"lr": 0.1}, TypeError, "base must be a subclass of torch.optim.Optimizer, got 'AdamW'"),
        (nn.Linear, {"lr": 0.1}, TypeError, "base must be a subclass of torch.optim.Optimizer"),
        (None, {"lr": 0.1}, TypeError, "base must be a subclass of torch.optim.Optimizer, got None"),
        (torch.optim.SGD, {"lr": NAN}, ValueError, "lr=nan .*finite number >= 0"),
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": NAN}, ValueError, "weight_decay=nan"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": -1}, ValueError, "base=SGD.*momentum.*-1"),
        (torch.optim.AdamW, {"lr": 0.1, "beta": 0.9}, TypeError, "base=AdamW.*beta"),
        (torch.optim.Adadelta, {"lr": 0.1, "rho": 1.5}, ValueError, "base=Adadelta.*rho.*1.5"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(base, options, kind, match):
    model = tiny_net()
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        chunkft.ChunkOptimizer(model, base, chunks=3, **options)
    assert_untouched(model, before)
    chunkft.ChunkOptimizer(model, torch.optim.SGD, chunks=3, lr=0.1)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (None, "torch.nn.Module or a list of parameter groups, got NoneType"),
        ("model", "got str"),
        (3, "got int"),
        ([], "got an empty list"),
        ((), "got an empty tuple"),
        ({}, "got dict"),
        (torch.zeros(3), "got Tensor"),
        (nn.Linear, "got type"),
        ([3], "parameter group 0 must be a dict with 'params', got int"),
        ([{"lr": 0.1}], "parameter group 0 must be a dict with 'params', got dict"),
        ([{"params": ["weight"]}], "parameter group 0 must hold tensors, got str 'weight'"),
        ([{"params": 3}], "parameter group 0 must hold tensors, got int 3"),
    ],
)
def test_what_is_no_model_is_refused(model, match):
    with pytest.raises(TypeError, match=match):
        chunkft.ChunkAdamW(model, chunks=1)


def test_a_model_without_trainable_parameters_is_refused():
    model = mlp().requires_grad_(False)
    before = snapshot(model)
    for build in (chunkft.ChunkAdamW, chunkft.attach, chunkft.partition):
        with pytest.raises(ValueError, match="no trainable parameter"):
            build(model)
        assert_untouched(model, before)
    with pytest.raises(ValueError, match="no trainable parameter"):
        chunkft.ChunkAdamW(nn.ReLU(), chunks=1)
    model.requires_grad_(True)
    chunkft.ChunkAdamW(model, chunks=2)


def test_a_model_whose_parameters_were_all_frozen_after_attach_is_refused():
    model = mlp()
    chunkft.attach(model)
    model.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="trainable"):
        chunkft.ChunkAdamW(model, chunks=2)
    with pytest.raises(ValueError, match="trainable"):
        chunkft.ChunkAdamW(list(model.parameters()), chunks=2)
    assert_untouched(model, before)


def test_groups_have_to_be_of_one_attached_model():
    one, two = mlp(), tiny_net()
    with pytest.raises(
        ValueError, match=r"group 0 has a parameter of shape \(37, 13\).*chunkft.attach\(model\)"
    ):
        chunkft.ChunkAdamW(one.parameters(), chunks=2)
    chunkft.attach(one)
    with pytest.raises(ValueError, match=r"group 1 has a parameter.*chunkft.attach\(model\)"):
        chunkft.ChunkAdamW([{"params": one.parameters()}, {"params": two.parameters()}], chunks=2)
    chunkft.attach(two)
    before = snapshot(one), snapshot(two)
    with pytest.raises(ValueError, match=r"one attached model.*2 models"):
        chunkft.ChunkAdamW([{"params": one.parameters()}, {"params": two.parameters()}], chunks=2)
    parameters = list(one.parameters())
    with pytest.raises(ValueError, match="more than one parameter group"):
        chunkft.ChunkAdamW([{"params": parameters}, {"params": parameters[:1]}], chunks=2)
    with pytest.raises(ValueError, match="parameter group 1: lr=nan"):
        chunkft.ChunkAdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": NAN}], chunks=2)
    with pytest.raises(ValueError, match="parameter group 1: weight_decay=-1"):
        chunkft.ChunkAdamW(
            [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": -1}], chunks=2
        )
    assert_untouched(one, before[0])
    assert_untouched(two, before[1])
    optimizer = chunkft.ChunkAdamW(parameters, chunks=2, interval=1)
    train(one, optimizer, mlp_loss, range(2))


def test_a_second_optimizer_on_a_model_is_refused_and_the_first_goes_on():
    model, twin = tiny_net(), tiny_net()
    first, reference = (chunkft.ChunkAdamW(m, chunks=3, interval=2) for m in (model, twin))
    train(model, first, tiny_loss, range(3))
    with pytest.raises(ValueError, match=r"another optimizer.*detach\(\)"):
        chunkft.ChunkAdamW(model, chunks=3)
    with pytest.raises(ValueError, match=r"another optimizer.*detach\(\)"):
        chunkft.ChunkAdamW([p for p in model.parameters() if p.requires_grad], chunks=3)
    with pytest.raises(ValueError, match=r"attached.*detach\(\)"):
        chunkft.partition(model, 3)
    train(model, first, tiny_loss, range(3, 9))
    train(twin, reference, tiny_loss, range(9))
    assert_same_weights(model, twin)
    del first
    chunkft.attach(model).detach()  # what the message says for an optimizer that is gone
    chunkft.ChunkAdamW(model, chunks=3)


def test_numbers_of_other_libraries_are_taken_where_they_are_numbers():
    model, twin = tiny_net(), tiny_net()
    for m, lr in ((model, np.float64(1e-2)), (twin, 1e-2)):
        optimizer = chunkft.ChunkAdamW(m, lr=lr, chunks=3, interval=1, max_grad_norm=np.float64(1.0))
        train(m, optimizer, tiny_loss, range(4))
    assert_same_weights(model, twin)


def test_a_schedule_that_goes_wrong_later_says_so_and_loses_no_update():
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=2, schedule=lambda n, k: 0 if n < 2 else 7)
    train(model, optimizer, tiny_loss, range(3))
    with pytest.raises(ValueError, match=r"schedule returned 7 for interval 2; needs .* 0 <= chunk < 3"):
        train(model, optimizer, tiny_loss, [3])
    assert optimizer.updates == 4
    optimizer.detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_weights_of_a_dtype_that_cannot_be_trained_are_refused(dtype):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype))
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"dtype.*cannot be trained|does not take"):
        chunkft.ChunkAdamW(model, chunks=1)
    assert [p.requires_grad for p in model.parameters()] == before
    assert "_chunkft" not in model.__dict__
