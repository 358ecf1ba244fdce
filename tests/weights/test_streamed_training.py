"""Training with weights that stream is training with resident ones: every loss, gradient and weight, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_transformers import build, loss_of
from torch.utils.checkpoint import checkpoint

import chunkft
from chunkft.weights import WeightStream
from chunkft.weights.visits import Visits

UPDATES = ("host", "device")


@dataclass
class Run:
    """What a training run computed; gradients are those before each step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def assert_equal(self, other: Run) -> None:
        assert self.losses == other.losses
        for step, (mine, theirs) in enumerate(zip(self.gradients, other.gradients, strict=True)):
            assert mine.keys() == theirs.keys()
            for name, gradient in mine.items():
                assert torch.equal(gradient, theirs[name]), f"step {step}: {name}"
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), name


def model_of(family: str, checkpointing: bool = False, **changes: Any) -> torch.nn.Module:
    model = build(family, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def optimizer_of(model: torch.nn.Module, where: str | None, stream: dict[str, Any], **options: Any) -> Any:
    if where is not None:
        streamed = WeightStream(model, device="cpu", poison=True, **stream)
        options |= {"weights": streamed, "update_on": where}
    return chunkft.ChunkAdamW(model, lr=1e-2, **options)


def train(run: Run, model: Any, optimizer: Any, family: str, steps: range, window: int = 1) -> Run:
    for step in steps:
        for number in range(window):
            loss = loss_of(family, step * window + number)(model)
            loss.backward()
            run.losses.append(loss.item())
        pairs = optimizer.active_parameters()
        run.gradients.append({str(p): leaf.grad.clone() for p, leaf in pairs if leaf.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: value.clone() for name, value in model.state_dict().items()}
    return run


def trained(
    family: str,
    update: str | None,
    *,
    stream: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    steps: int = 7,
    window: int = 1,
    **options: Any,
) -> Run:
    net = model_of(family, **(model or {}))
    return train(Run(), net, optimizer_of(net, update, stream or {}, **options), family, range(steps), window)


DEEP = {"num_hidden_layers": 4}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("chunks", [1, 4, 16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_streamed_training_equals_resident_training(tied, chunks, interval, update):
    options = {
        "model": DEEP | {"tie_word_embeddings": tied, "checkpointing": chunks != 4},
        "chunks": chunks,
        "interval": interval,
        "steps": 6 if chunks < 16 else 18 if interval == 1 else 10,
    }
    trained("llama", update, **options).assert_equal(trained("llama", None, **options))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral", "gpt-oss", "bert", "mamba"])
def test_other_architectures_stream_as_well(family, update):
    options: dict[str, Any] = {"chunks": 3, "interval": 2}
    trained(family, update, **options).assert_equal(trained(family, None, **options))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "max_grad_norm": 0.05},
        {"stream": {"resident_blocks": 2}},
        {"stream": {"offload_inputs": True}},
        {"stream": {"slots": 2}, "slice_dim": 1},
        {"partition": "interleaved", "schedule": "random"},
        {"partition": "layers", "schedule": "reverse", "chunks": None, "always_active": "head"},
        {"keep_state": False, "interval": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_training_mean_the_same_while_weights_stream(options, update):
    resident = {name: value for name, value in options.items() if name != "stream"}
    given: dict[str, Any] = {"model": DEEP | {"checkpointing": True}, "chunks": 5, "interval": 1}
    trained("llama", update, **given | options).assert_equal(trained("llama", None, **given | resident))


@pytest.mark.parametrize(
    "options",
    [
        {"state_device": "paged"},
        {"residency": "stream", "page_bytes": 4096},
        {"residency": "stream", "page_bytes": 4096, "update": "backward"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_state_is_paged_beside_the_ring(options):
    given: dict[str, Any] = {"chunks": 4, "interval": 2} | options
    runs = []
    for where in ("device", None):
        net = model_of("llama", True, **DEEP)
        runs.append(train(Run(), net, optimizer_of(net, where, {}, **given), "llama", range(7)))
    runs[0].assert_equal(runs[1])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("master", ["residual", "fp32", "stochastic"])
def test_masters_of_16_bit_weights(master, update):
    given: dict[str, Any] = {"chunks": 3, "interval": 2, "master": master}
    runs = []
    for where in (update, None):
        net = model_of("llama", True).to(torch.bfloat16)
        runs.append(train(Run(), net, optimizer_of(net, where, {}, **given), "llama", range(7)))
    runs[0].assert_equal(runs[1])


@pytest.mark.parametrize("update", UPDATES)
def test_a_run_resumes_where_it_was_on_resident_weights_and_back(update):
    given: dict[str, Any] = {"chunks": 4, "interval": 2}
    whole = trained("llama", None, steps=11, **given)
    run = Run()
    saved: dict[str, Any] = {}
    for part, where in enumerate((update, None, update)):
        net = model_of("llama", checkpointing=True)
        if saved:
            net.load_state_dict(saved["model"])
        optimizer = optimizer_of(net, where, {}, **given)
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
        train(run, net, optimizer, "llama", (range(3), range(3, 8), range(8, 11))[part])
        saved = {"model": run.weights, "optimizer": optimizer.state_dict()}
        optimizer.detach()
    run.assert_equal(whole)


def test_a_page_that_leaves_before_the_backward_pass_of_its_block_is_found_out(monkeypatch):
    """The control: blocks are left after their recompute, and gradients are not those of the resident model."""
    given: dict[str, Any] = {"chunks": 1}
    resident = trained("llama", None, model=DEEP | {"checkpointing": True}, steps=1, **given)
    net = model_of("llama", True, **DEEP)
    optimizer = optimizer_of(net, "host", {}, **given)
    ring = chunkft.weights.stream_of(net).ring
    stale: dict[int, torch.Tensor] = {}

    def leave(number):
        def leave_early(*_):
            if torch._C._current_graph_task_id() != -1 and ring.holds(number):
                stale[number] = ring._held[number]
                ring.leave(number)

        return leave_early

    def stale_view(visits, reference):
        """As if what autograd kept were the memory itself, and not asked for again."""
        if reference.number not in stale:
            return demand(visits, reference)
        dtype, shape, strides, offset = reference.layout
        return stale[reference.number].view(dtype).as_strided(shape, strides, offset)

    demand = Visits.demand
    monkeypatch.setattr(Visits, "demand", stale_view)
    for number, block in enumerate(net.model.layers):
        block.mlp.register_forward_hook(leave(number), always_call=True)
    early = train(Run(), net, optimizer, "llama", range(1))
    assert early.losses == resident.losses  # a healthy loss
    spoilt = [name for name, gradient in early.gradients[0].items() if gradient.isnan().any()]
    assert any("layers.0" in name for name in spoilt)


@pytest.mark.parametrize("update", UPDATES)
def test_a_recompute_that_calls_the_block_finds_its_weights(update):
    """Checkpoints around a block call it again in the backward pass; those in it do not."""
    runs = []
    for where in (update, None):
        net = build("llama", use_cache=False, **DEEP)
        optimizer = optimizer_of(net, where, {}, chunks=3, interval=1)
        with mock.patch.object(type(net.model.layers[0]), "__call__", checkpointed_call):
            runs.append(train(Run(), net, optimizer, "llama", range(4)))
    runs[0].assert_equal(runs[1])


def checkpointed_call(block, *args, **kwargs):
    return checkpoint(torch.nn.Module.__call__, block, *args, use_reentrant=False, **kwargs)
