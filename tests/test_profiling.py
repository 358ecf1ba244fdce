"""The account of memory and the trace of ``chunkft.profiling``."""

import itertools
import json
import time

import pytest
import torch
import torch.nn.functional as F
from profile_rigs import batches, block, chain, chain_loss, data, llama
from residencies import MODES
from torch import nn
from torch.profiler import record_function

import chunkft
from chunkft.profiling import Ledger, Phase, Timeline, profile
from chunkft.profiling.recording import Recorder
from chunkft.profiling.session import _snapshots
from chunkft.profiling.trace import Clock


def counted(model, optimizer, steps=3, loss=chain_loss, found=None):
    """A timeline of some steps, after one that makes the state of the first chunk."""
    recorder = Recorder(model, optimizer, loss, ([batch] for _ in range(99) for batch in found or data()))
    recorder.warm_up()
    if isinstance(optimizer, chunkft.ChunkOptimizer):
        optimizer.memory_report()  # peaks start anew
    with recorder.accounting():
        for _ in range(steps):
            recorder.accounted_step()
    return recorder.timeline()


def test_activations_are_those_that_autograd_saves_and_have_the_name_of_their_module():
    model = chain()
    x = torch.randn(7, 19)
    with chunkft.saved_activations(model) as saved:
        loss = chain_loss(model, x)
    timeline = counted(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, found=[x])
    forward = next(phase for phase in timeline.phases if phase.name == "forward")
    alive = [block for block in timeline.alive(forward.end) if block.category == "activations"]
    assert sum(block.nbytes for block in alive) == saved.live_bytes - x.nbytes  # the batch is no activation
    sizes = {block.saved_by: block.nbytes for block in alive}
    assert sizes["1"] == 7 * 40 * 4  # a sigmoid keeps its output
    assert sizes["3"] == 7 * 23 * 4
    del loss


def test_new_state_is_state_from_its_beginning_also_if_its_chunk_rests_after_the_same_step():
    model = chain()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    recorder = Recorder(model, optimizer, chain_loss, ([batch] for batch in data(9)))
    with recorder.accounting():
        recorder.accounted_step()
    timeline = recorder.timeline()
    fresh = [
        block for block in timeline.blocks if block.op.startswith("aten.zeros_like") and block.nbytes > 4
    ]
    assert fresh
    assert {block.category for block in fresh} == {"state"}
    assert all(block.freed is not None for block in fresh)  # it went into the arena
    assert optimizer._memory.on_state is None


@pytest.mark.parametrize("place", [None, "device", *MODES])
def test_gradients_and_state_are_those_of_the_memory_report(place):
    model = chain()
    places = {None: {}, "device": {"state_device": "device"}, **MODES}
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1, **places[place])
    timeline = counted(model, optimizer, 4)
    report = optimizer.memory_report()
    if place != "backward":
        assert int(timeline.bytes["gradients"].max()) == report.gradients.peak
    else:  # between two products of the backward pass gradients of the module before may wait in the engine
        assert report.gradients.peak <= int(timeline.bytes["gradients"].max()) <= 1.5 * report.gradients.peak
    # On a CPU all memory is one: that of the arenas or pages, slots, and what is not in either yet.
    held = report.state_host.now + (0 if report.in_place else report.state_device.now)
    fresh = report.state_device.now if place is None and report.in_place else 0
    assert int(timeline.bytes["state"][-1]) in (held, held + fresh)
    assert int(timeline.bytes["weights"][0]) == report.weights.now


def test_everything_that_is_freed_leaves_the_account():
    model = chain()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=99)
    timeline = counted(model, optimizer, 3)
    for category in ("activations", "gradients"):
        assert timeline.bytes[category].max() > 0
        assert timeline.bytes[category][-1] == 0
    batches_held = 2 * 7 * 19 * 4
    assert (
        batches_held <= timeline.bytes["other"][-1] <= batches_held + 64
    )  # scalars that the optimizer keeps
    assert timeline.bytes["state"][-1] == timeline.bytes["state"][0] > 0


def test_the_peak_names_phase_operator_module_and_shape(tmp_path):
    class Wide(nn.Module):
        def forward(self, x):
            return x.repeat(1, 50).sin().sum(1, keepdim=True) * x

    model = nn.Sequential(nn.Linear(19, 8), Wide(), nn.Linear(8, 3))
    result = profile(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data(), loss=chain_loss, out=tmp_path
    )
    peak = result.peak
    assert peak.phase in ("forward", "backward")
    assert peak.allocation.module == "1"
    assert peak.allocation.shape == (7, 400)
    assert peak.nbytes == sum(peak.by_category.values())
    assert peak.largest_tensor.shape == (7, 400)
    assert peak.largest[0].module == "1"
    assert peak.largest[0].nbytes >= 7 * 400 * 4
    assert "aten." in result.summary()
    assert "1" in result.summary()


def test_backward_operators_have_the_name_of_the_module_whose_forward_pass_they_undo():
    model = chain()
    timeline = counted(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    made = {(b.module, b.op) for b in timeline.blocks if b.phase == "backward"}
    assert ("3", "aten.sigmoid_backward") in made
    assert ("1", "aten.sigmoid_backward") in made
    assert not any(op == "aten.sigmoid_backward" and module not in ("1", "3") for module, op in made)


def test_views_and_memory_from_before_are_not_counted():
    before = torch.randn(1000)
    ledger = Ledger(nn.Linear(3, 3), torch.device("cpu"), lambda: 0, lambda: None)
    with ledger:
        before.add_(1)
        before.view(10, 100).t()
        torch.zeros(10, out=before[:10])
        fresh = before * 2
        fresh[3:].mul_(3)
    assert [(block.op, block.nbytes) for block in ledger.blocks] == [("aten.mul.Tensor", 4000)]
    assert ledger.blocks[0].freed is None
    del fresh
    assert ledger.blocks[0].freed is not None


def spans(trace, prefix):
    return [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event["ph"] == "X" and event["name"].startswith(prefix)
    ]


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    out = tmp_path_factory.mktemp("paged")
    model = llama()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1, state_device="paged")
    for _ in range(5):  # afterwards every chunk has state that has to come
        model(**batches()[0]).loss.backward()
        optimizer.step()
    result = profile(model, optimizer, batches(), steps=3, warmup=0, out=out)
    return result, json.loads((out / "trace.json").read_text())


def test_compute_and_copies_share_one_time_axis(tmp_path):
    model = llama()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=50, state_device="paged")
    (pager,) = optimizer._store.pagers.values()

    def loss(model, batch):
        # On the CPU acquire() waits for the copy: it lies inside of this range, however busy the machine is.
        with record_function("test/copy"):
            pager.acquire(2)
        pager.discard(2)
        return model(**batch).loss

    profile(model, optimizer, batches(), steps=3, warmup=0, out=tmp_path, loss=loss)
    trace = json.loads((tmp_path / "trace.json").read_text())
    slack = 200.0  # microseconds that the two clocks may be apart
    ranges = sorted((a, b) for _, a, b in spans(trace, "test/copy"))
    loads = sorted((a, b) for _, a, b in spans(trace, "load 2"))
    assert len(ranges) == 3
    assert len(loads) == 6  # those of the steps whose memory is counted come after
    for (start, end), (a, b) in zip(ranges, loads, strict=False):
        assert start - slack <= a <= b <= end + slack
    # The phases that we timed enclose the ranges that torch timed.
    phases, timed = sorted(spans(trace, "forward"))[:3], sorted(spans(trace, "chunkft/forward"))
    assert len(timed) == 3
    for (_, start, end), (_, a, b) in zip(phases, timed, strict=True):
        assert start - slack <= a <= b <= end + slack


def test_chunk_residency_is_a_track_without_gaps_between_its_steps(paged):
    result, trace = paged
    chunks = [(name, a, b) for name, a, b in spans(trace, "chunk ")]
    assert [name for name, _, _ in chunks] == [
        "chunk 1",
        "chunk 2",
        "chunk 3",
        "chunk 0",
        "chunk 1",
        "chunk 2",
    ]
    assert all(before[2] <= after[1] for before, after in itertools.pairwise(chunks))
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C" and event["name"] == "bytes"]
    assert max(sum(event["args"].values()) for event in counters) == result.peak.nbytes
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    ours = [name for name in names.values() if name.startswith("chunkft")]
    assert len(ours) == len(names) - 1 == 3  # chunks, copies, memory, beside torch's


def test_clocks_are_tied_by_the_reading_that_says_most():
    clock = Clock()
    clock._readings = [(0, 1_000_000), (5_000_000, 5_010_000)]
    events = [
        {"ph": "X", "name": "chunkft/clock", "ts": 700.0, "dur": 2.0},
        {"ph": "X", "name": "chunkft/clock", "ts": 15_004.0, "dur": 2.0},
    ]
    assert clock.offset(events) == pytest.approx(10_000.0)
    with pytest.raises(RuntimeError, match="1 of 2"):
        clock.offset(events[:1])


def test_a_timeline_is_the_sum_of_its_blocks_at_every_moment():
    blocks = [
        block("gradients", 5, 10, 30),
        block("activations", 7, 10, 20),
        block("other", 11, 20, None),
        block("state", 13, 25, 26),
    ]
    timeline = Timeline(blocks, [(5, 100), (25, 90)], 1000, [Phase("step", 0, 1, 24, 40)])
    levels = dict(zip(timeline.times.tolist(), timeline.total.tolist(), strict=True))
    assert levels == {5: 1100, 10: 1112, 20: 1116, 25: 1119, 26: 1106, 30: 1101}
    assert timeline.peak() == (3, 1119)
    assert timeline.phase_at(25).name == "step"
    assert timeline.phase_at(3) is None


def test_stopping_writes_what_was_seen(tmp_path):
    model = chain()
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 3  # warm-up, then two timed steps

    result = profile(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data(),
        steps=5,
        loss=chain_loss,
        out=tmp_path,
        stop=stop,
    )
    assert result.interrupted
    assert result.steps == 2
    assert result.peak is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "trace.json"]
    assert json.loads((tmp_path / "memory.json").read_text())["interrupted"]
    assert len(spans(json.loads((tmp_path / "trace.json").read_text()), "forward")) == 2


def test_profiling_trains_as_without_it(tmp_path):
    plain, profiled = chain(), chain()
    one, other = (chunkft.ChunkAdamW(m, chunks=3, interval=1, lr=1e-2) for m in (plain, profiled))
    found = data(3)
    for step in range(1 + 2 * 4):
        chain_loss(plain, found[step % 3]).backward()
        one.step()
    profile(profiled, other, found, steps=4, loss=chain_loss, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), profiled.parameters(), strict=True))
    hooks = [[len(leaf._backward_hooks or ()) for _, leaf in o.active_parameters()] for o in (one, other)]
    assert hooks[0] == hooks[1]  # those of the profile are gone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"accumulation": 1.5}, "accumulation=1.5"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_bad_input_is_named(options, words, tmp_path):
    model = chain()
    options = {"batches": data(), **options}
    with pytest.raises(ValueError, match=words):
        profile(model, torch.optim.SGD(model.parameters()), loss=chain_loss, out=tmp_path, **options)


def test_a_model_without_a_loss_is_named(tmp_path):
    model = llama()
    found = [{"input_ids": batch["input_ids"]} for batch in batches()]
    with pytest.raises(ValueError, match="give loss="):
        profile(model, chunkft.ChunkAdamW(model, chunks=2), found, out=tmp_path)


def test_on_a_gpu_the_snapshot_is_that_of_torch(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all", **options: calls.append(enabled)
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    with _snapshots(torch.device("cuda"), tmp_path / "s.pickle"):
        calls.append("steps")
    assert calls == ["all", "steps", str(tmp_path / "s.pickle"), None]
    with _snapshots(torch.device("cpu"), tmp_path / "s.pickle"):
        pass
    assert len(calls) == 4


def test_for_nsight_the_steps_lie_between_start_and_stop_and_torch_records_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    model = chain()
    recorder = Recorder(model, torch.optim.SGD(model.parameters()), chain_loss, iter([]))
    recorder.device = torch.device("cuda")
    with recorder.profiling(Clock(), with_torch=False) as profiler:
        calls.append(chunkft.tracing.is_enabled())
    assert profiler is None
    assert calls == ["start", True, "stop"]
    assert not chunkft.tracing.is_enabled()


def test_the_account_costs_no_memory_afterwards():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    timeline = counted(model, optimizer, 2)
    begun = time.perf_counter_ns()
    F.relu(torch.randn(5))
    assert not any(block.born > begun for block in timeline.blocks)
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
