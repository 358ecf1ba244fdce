"""Ranges in the timelines of profilers: where they are, how they are nested, and that they cost nothing when off."""

import importlib.util
import re
import threading
import timeit

import pytest
import torch
import torch.nn.functional as F
from helpers import IDS, small, small_loss, walk
from residencies import PAGE
from torch import nn
from torch.profiler import ProfilerActivity, profile

import chunkft
from chunkft import tracing
from chunkft.autograd import compilable, sliced_linear_cross_entropy


def spans(run):
    """Name, start and end in microseconds of every range of chunkft in the events of torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.name.startswith("chunkft/")
    ]


def trained(optimizer, model, steps):
    with tracing.enabled():
        return spans(lambda: walk(optimizer, model, steps))


def test_step_switch_and_backward_are_named_by_what_they_do():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=2)
    found = trained(optimizer, model, 5)
    names = [name for name, _, _ in found]
    assert names.count("chunkft/step") == 5
    assert [name for name in names if "switch" in name] == ["chunkft/switch 0->1", "chunkft/switch 1->2"]
    expected = {
        f"chunkft/backward {str(piece).replace('.weight', '')}"
        for chunk in optimizer.plan
        for piece in chunk.slices
        if piece.dim is not None
    }
    backward = {name for name in names if "backward" in name}
    assert backward == expected
    assert any(re.fullmatch(r"chunkft/backward \d\[\d+:\d+\]", name) for name in backward)


def test_switches_lie_inside_of_steps_and_backward_passes_outside():
    model = small()
    found = trained(chunkft.ChunkAdamW(model, chunks=3, interval=1), model, 3)
    steps = [(start, end) for name, start, end in found if name == "chunkft/step"]
    for name, start, end in found:
        inside = any(a <= start and end <= b for a, b in steps)
        assert inside == (not name.startswith("chunkft/backward")), name


def test_pages_are_fetched_and_updated_inside_of_the_backward_pass_that_needs_them():
    model = small()
    options = {"chunks": 2, "interval": 9, "residency": "stream", "page_bytes": PAGE, "update": "backward"}
    optimizer = chunkft.ChunkAdamW(model, **options)
    walk(optimizer, model, 1)  # afterwards there is something to fetch
    with tracing.enabled():
        found = spans(lambda: small_loss(model).backward())
    updates = [name for name, _, _ in found if name.startswith("chunkft/update ")]
    assert len(updates) > 2
    assert not any(name == "chunkft/step" for name, _, _ in found)
    fetched = [(start, end) for name, start, end in found if re.fullmatch(r"chunkft/prefetch page \d+", name)]
    during = [(start, end) for name, start, end in found if name.startswith("chunkft/update ")]
    assert fetched
    assert all(any(a <= start and end <= b for a, b in during) for start, end in fetched)


def test_nothing_is_emitted_when_off_and_training_is_the_same():
    runs = []
    for on in (False, True):
        torch.manual_seed(3)
        model = small()
        optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)

        def run(model=model, optimizer=optimizer):
            walk(optimizer, model, 4)

        with tracing.enabled(on):
            found = spans(run)
        assert bool(found) == on
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_is_saved_for_the_backward_pass_does_not_depend_on_tracing():
    sizes = []
    for on in (False, True):
        model = small()
        chunkft.ChunkAdamW(model, chunks=2, interval=1)
        with tracing.enabled(on), chunkft.saved_activations(model) as saved:
            small_loss(model).backward()
        sizes.append((saved.peak_bytes, saved.live_bytes))
    assert sizes[0] == sizes[1]
    assert sizes[0][1] == 0


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_turns_ranges_on(monkeypatch, value, on):
    if value is None:
        monkeypatch.delenv("CHUNKFT_TRACE", raising=False)
    else:
        monkeypatch.setenv("CHUNKFT_TRACE", value)
    spec = importlib.util.spec_from_file_location("tracing_again", tracing.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.is_enabled() == on


def test_a_range_that_is_off_costs_less_than_a_small_operator():
    assert not tracing.is_enabled()
    x = torch.ones(4)

    def off():
        with tracing.span("backward %s", "name"):
            pass

    ours = min(timeit.repeat(off, number=2000, repeat=5))
    add = min(timeit.repeat(lambda: x + x, number=2000, repeat=5))
    assert ours < add


class FakeNvtx:
    """Keeps a stack of ranges for each thread, as NVTX does."""

    def __init__(self):
        self.open = {}
        self.closed = []

    def range_push(self, name):
        self.open.setdefault(threading.get_ident(), []).append(name)

    def range_pop(self):
        self.closed.append((threading.get_ident(), self.open[threading.get_ident()].pop()))


@pytest.fixture
def nvtx(monkeypatch):
    fake = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return fake


def test_nvtx_ranges_are_closed_in_the_thread_that_opened_them(nvtx):
    model = small()
    loss = small_loss(model)
    with tracing.enabled():
        optimizer = chunkft.ChunkOptimizer(model, torch.optim.SGD, chunks=2, interval=1, lr=0.1)
        loss = small_loss(model)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        optimizer.step()
    assert all(not stack for stack in nvtx.open.values())
    by_thread = {}
    for ident, name in nvtx.closed:
        by_thread.setdefault(ident, []).append(name)
    here = by_thread.pop(threading.get_ident())
    assert here == ["chunkft/switch 0->1", "chunkft/step"]
    (there,) = by_thread.values()
    assert there
    assert all(name.startswith("chunkft/backward ") for name in there)


def test_nvtx_ranges_are_closed_when_a_step_fails(nvtx):
    model = small()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError("on purpose")

    optimizer = chunkft.ChunkOptimizer(model, Failing, chunks=2, interval=1, lr=0.1)
    small_loss(model).backward()
    with tracing.enabled(), pytest.raises(ArithmeticError):
        optimizer.step()
    assert nvtx.closed[-1][1] == "chunkft/step"
    assert all(not stack for stack in nvtx.open.values())


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_the_loss_of_the_head_and_column_slices_have_names_too(slice_dim):
    table = nn.Parameter(torch.randn(11, 6))
    bounds = (2, 5)
    piece = chunkft.Slice("head.weight", slice_dim, *bounds, (11, 6))
    leaf = piece.of(table.detach()).requires_grad_()
    hidden = torch.randn(3, 6, requires_grad=True)

    def run():
        sliced_linear_cross_entropy(hidden, table, torch.tensor([1, 0, 7]), [(piece, leaf)]).backward()

    with tracing.enabled():
        found = spans(run)
    window = "[2:5]" if slice_dim == 0 else "[:, 2:5]"
    assert [name for name, _, _ in found] == [f"chunkft/backward head{window}"]


def test_a_compiled_model_has_the_same_graphs_and_its_backward_passes_are_named():
    torch._dynamo.reset()
    counts = []
    for on in (False, True):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Embedding(19, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 7, bias=False))
        optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
        compilable(model)
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            from torch._dynamo.backends.debugging import aot_eager

            graphs.append(graph)
            return aot_eager(graph, inputs)

        compiled = torch.compile(model, backend=backend, fullgraph=True)

        def run(compiled=compiled, optimizer=optimizer):
            for _ in range(3):
                F.cross_entropy(compiled(IDS).flatten(0, 1), IDS.flatten() % 7).backward()
                optimizer.step()

        with tracing.enabled(on):
            found = spans(run)
        counts.append(len(graphs))
        names = {name for name, _, _ in found if name.startswith("chunkft/backward ")}
        assert bool(names) == on
        if on:
            assert any(re.fullmatch(r"chunkft/backward 2\[\d+:\d+\]", name) for name in names)
    assert counts == [1, 1]
    torch._dynamo.reset()
