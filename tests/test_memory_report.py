"""What the memory report predicts from the plan is what is counted in training, wherever the state lives."""

import json
import math

import pytest
import torch
from residencies import FILES, MODES, PAGE
from torch import nn

import chunkft
from chunkft.optim.report import MemoryPart

PLACES = {"host": {}, "device": {"state_device": "device"}, **MODES, **FILES}
PARTS = ("weights", "gradients", "state_device", "masters", "state_new", "state_host", "state_files")


def model(dtype=torch.float32):
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Embedding(29, 12),
        nn.Linear(12, 21, bias=False),
        nn.Tanh(),
        nn.Linear(21, 17, bias=False),
        nn.Linear(17, 5, bias=False),
    )
    layers[2].register_buffer("unused", torch.zeros(3))
    return layers.to(dtype)


IDS = torch.arange(24).view(4, 6)


def step(net, optimizer):
    net(IDS).float().square().sum().backward()
    optimizer.step()


def build(place, tmp_path, net, **options):
    options = {"lr": 1e-2, "chunks": 3, "interval": 2, **PLACES[place], **options}
    if place.endswith("-files"):
        options["state_dir"] = tmp_path / "state"
    return chunkft.ChunkAdamW(net, **options)


def sweep(net, optimizer):
    """All chunks, and one step more, when the state of the last one has been put away too."""
    for _ in range(optimizer.interval * len(optimizer.plan) + 1):
        step(net, optimizer)


@pytest.mark.parametrize("master", ["fp32-weights", "residual", "fp32", "stochastic", "none"])
@pytest.mark.parametrize("place", PLACES)
def test_predicted_equals_the_peak_of_a_sweep(place, master, tmp_path):
    net = model(torch.float32 if master == "fp32-weights" else torch.bfloat16)
    options = {} if master == "fp32-weights" else {"master": master}
    optimizer = build(place, tmp_path, net, **options)
    before = {name: optimizer.memory_report().parts()[name].predicted for name in PARTS}
    sweep(net, optimizer)
    parts = optimizer.memory_report().parts()
    assert {name: parts[name].peak for name in PARTS} == before
    assert {name: parts[name].predicted for name in PARTS} == before  # nothing of it came from the run
    if place.endswith("-files"):
        files = sum(path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file())
        assert parts["state_files"].peak == files > 0
    else:
        assert parts["state_files"].peak == 0


@pytest.mark.parametrize(
    "options",
    [
        {"always_active": "4.weight"},
        {"keep_state": False},
        {"keep_state": False, "dtype": torch.bfloat16},
        {"chunks": 1},
        {"slice_dim": 1},
        {"first_moment": "bf16"},
        {"first_moment": "bf16", "dtype": torch.bfloat16, "master": "fp32"},
        {"state_bits": 8},
        {"state_bits": 8, "dtype": torch.bfloat16, "keep_state": False},
        {"partition": "layers", "chunks": None},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("place", ["host", "device", "paged", "stream", "backward"])
def test_it_does_so_for_other_options_too(place, options, tmp_path):
    options = dict(options)
    net = model(options.pop("dtype", torch.float32))
    optimizer = build(place, tmp_path, net, **options)
    sweep(net, optimizer)
    parts = optimizer.memory_report().parts()
    assert {n: parts[n].peak for n in PARTS} == {n: parts[n].predicted for n in PARTS}


@pytest.mark.parametrize("place", ["host", "device", "paged", "stream", "backward"])
def test_it_does_so_after_going_on_from_another_number_of_chunks(place, tmp_path):
    source = model()
    first = build("host", tmp_path, source, chunks=4)
    sweep(source, first)
    net = model()
    optimizer = build(place, tmp_path, net, chunks=2)
    optimizer.load_state_dict(first.state_dict())
    sweep(net, optimizer)
    parts = optimizer.memory_report().parts()
    peaks = {n: parts[n].peak for n in PARTS}
    predicted = {n: parts[n].predicted for n in PARTS}
    assert peaks.pop("state_new") <= predicted.pop("state_new")  # what was loaded is on its pages
    assert peaks == predicted


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_it_does_so_for_other_optimizers(base):
    net = model()
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizer = chunkft.ChunkOptimizer(net, base, lr=1e-3, chunks=3, interval=1, **options)
    sweep(net, optimizer)
    parts = optimizer.memory_report().parts()
    assert {n: parts[n].peak for n in PARTS} == {n: parts[n].predicted for n in PARTS}
    elements = sum(p.numel() for p in net.parameters())
    assert parts["state_device"].full == elements * 4


def test_full_fine_tuning_is_what_adamw_really_holds():
    net, dense = model(), model()
    report = chunkft.ChunkAdamW(net, chunks=4).memory_report()
    adamw = torch.optim.AdamW(dense.parameters())
    step(dense, adamw)
    dense(IDS).sum().backward()
    held = sum(
        value.numel() * 4 for state in adamw.state.values() for value in state.values() if value.dim() > 0
    )
    assert report.state_device.full == held
    assert report.gradients.full == sum(p.grad.numel() * 4 for p in dense.parameters())
    assert report.masters.full == report.state_host.full == 0
    half = chunkft.ChunkAdamW(model(torch.bfloat16), chunks=4).memory_report()
    assert half.masters.full == 4 * sum(p.numel() for p in dense.parameters())
    assert half.gradients.full == report.gradients.full // 2


def test_now_is_what_exists_and_peaks_start_anew_with_every_report():
    net = model()
    optimizer = build("host", None, net)
    net(IDS).square().sum().backward()
    leaves = [leaf for _, leaf in optimizer.active_parameters()]
    during = optimizer.memory_report()
    assert during.gradients.now == sum(leaf.grad.numel() * 4 for leaf in leaves) > 0
    assert during.state_device.now == 0
    optimizer.step()
    after = optimizer.memory_report()
    assert after.gradients.now == 0
    assert after.gradients.peak == during.gradients.now
    assert after.state_device.now == 2 * during.gradients.now
    again = optimizer.memory_report()
    assert again.gradients.peak == again.gradients.now == 0
    assert again.state_device.peak == after.state_device.now


@pytest.mark.parametrize("place", ["backward", "one-page-a-slice"])
def test_gradients_of_all_slices_of_a_weight_are_counted_as_they_come(place, tmp_path):
    # one matrix product gives the gradients of all of its slices at once, whatever their pages are
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96, bias=False), nn.Linear(96, 3, bias=False))
    options = {"chunks": 1, "residency": "stream", "page_bytes": PAGE, "update": "backward"}
    optimizer = chunkft.ChunkAdamW(net, **options)
    alive = []
    for _, leaf in optimizer.active_parameters():
        leaf.register_hook(lambda grad: alive.append(grad.numel() * 4))
    assert sum(piece.name == "0.weight" for piece, _ in optimizer.active_parameters()) > 3
    net(torch.randn(5, 16)).square().sum().backward()
    assert optimizer.memory_report().gradients.peak >= 16 * 96 * 4
    optimizer.step()


def test_activations_are_those_of_the_step_that_was_watched():
    net = model()
    optimizer = build("host", None, net)
    assert optimizer.memory_report().activations == MemoryPart()
    with optimizer.saved_activations():
        loss = net(IDS).square().sum()
    with chunkft.saved_activations(net) as expected:
        other = net(IDS).square().sum()
    part = optimizer.memory_report().activations
    assert part.now == part.peak == expected.live_bytes > 0
    loss.backward()
    part = optimizer.memory_report().activations
    assert part.now == 0
    assert part.peak == expected.peak_bytes
    assert optimizer.memory_report().activations == MemoryPart()
    other.backward()


def test_state_that_cannot_be_foreseen_is_unknown_and_not_zero(recwarn):
    class Secret(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].device.type == "meta":
                raise RuntimeError("no meta tensors")
            super().step(closure)

    net = model()
    optimizer = chunkft.ChunkOptimizer(net, Secret, lr=1e-3, chunks=3, interval=1)
    step(net, optimizer)
    report = optimizer.memory_report()
    assert report.state_device.predicted is None
    assert report.state_device.full is None
    assert report.gradients.predicted is not None
    assert "chunkft/state_device_predicted_bytes" not in report.metrics()
    assert "-" in report.table()


def test_the_report_is_a_table_json_and_metrics_of_the_same_numbers():
    net = model()
    optimizer = build("host", None, net)
    step(net, optimizer)
    report = optimizer.memory_report()
    assert json.loads(report.to_json()) == report.as_dict()
    values = report.as_dict()
    for name, value in report.metrics(prefix="m/").items():
        part, kind = name.removeprefix("m/").removesuffix("_bytes").rsplit("_", 1)
        assert values[part][kind] == value
        assert isinstance(value, int)
        assert math.isfinite(value)
    known = sum(
        v is not None for name, part in values.items() if isinstance(part, dict) for v in part.values()
    )
    assert len(report.metrics()) == known > 20
    lines = str(report).splitlines()
    assert lines[0].split()[-2:] == ["full", "fine-tuning"]
    assert any(line.startswith("gradients ") for line in lines)
    assert report.in_place
    assert "part of that in host memory" in lines[-1]


def test_a_detached_optimizer_reports_nothing():
    optimizer = build("host", None, model())
    optimizer.detach()
    with pytest.raises(RuntimeError, match="memory_report"):
        optimizer.memory_report()
