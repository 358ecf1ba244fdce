"""A profile of a model whose weights stream: their copies are on its time axis, and their places in its account."""

import json

import pytest
from profile_rigs import batches, llama

import chunkft
from chunkft.profiling import profile
from chunkft.profiling.recording import Recorder
from chunkft.weights import stream_of

LAYERS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A profiled model with paged state, its result and its trace."""
    out = tmp_path_factory.mktemp("streamed")
    model = llama(LAYERS)
    optimizer = chunkft.ChunkAdamW(
        model, chunks=3, interval=1, weights="stream", update_on="device", state_device="paged", device="cpu"
    )
    result = profile(model, optimizer, batches(), steps=3, warmup=3, out=out)
    yield model, optimizer, result, json.loads((out / "trace.json").read_text())
    optimizer.detach()


def tracks(trace):
    """Events of each process of a trace by its name."""
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    found = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["pid"] in names:
            found[names[event["pid"]]].append(event)
    return found


def test_copies_of_blocks_and_tiles_are_tracks_of_their_own(run):
    model, _, _, trace = run
    found = tracks(trace)
    stream = stream_of(model)
    assert {
        "chunkft pager on cpu",
        "chunkft weights, blocks, to cpu",
        "chunkft weights, tiles, to cpu",
    } <= set(found)
    blocks = found["chunkft weights, blocks, to cpu"]
    loads = [event for event in blocks if event["cat"] == "load"]
    # six steps are on the axis: those of torch's profiler, and those whose memory is counted; every forward pass
    # brings each block, and the backward pass those below what the ring still holds
    for number, block in enumerate(stream.streamed):
        own = [event for event in loads if event["name"] == f"load {block.name}"]
        assert 6 <= len(own) <= (12 if number < LAYERS - stream.ring.slots else 6), block.name
        assert {event["args"]["bytes"] for event in own} == {block.nbytes}
    assert not [event for event in blocks if event["cat"] == "store"]
    # tiles come once forward; in the backward pass those come that the two slots do not hold
    tiles = [event for event in found["chunkft weights, tiles, to cpu"] if event["cat"] == "load"]
    assert len(tiles) >= 6 * len(stream.units.tables[-1].tiles)


def test_copies_come_in_the_phases_that_need_them(run):
    _, _, _, trace = run
    phases = [e for e in tracks(trace)["chunkft"] if e["name"] in ("forward", "backward")]
    loads = [e for e in tracks(trace)["chunkft weights, blocks, to cpu"] if e["cat"] == "load"]
    slack = 300.0  # microseconds that the two clocks may be apart
    for load in loads:
        assert any(
            phase["ts"] - slack <= load["ts"]
            and load["ts"] + load["dur"] <= phase["ts"] + phase["dur"] + slack
            for phase in phases
        ), load


def test_weights_are_counted_where_they_are(run):
    model, optimizer, result, _ = run
    report = optimizer.memory_report()
    places = stream_of(model).memory()
    assert report.weights.now == places["resident"] + places["ring"] + places["tiles"]
    # on the CPU host pages and slots are in one memory
    assert int(result.timeline.bytes["weights"][0]) == report.weights.now + report.weights_host.now


def test_a_profile_looks_at_the_device_that_weights_stream_to(monkeypatch):
    """Not at the first parameter's, which is in host memory."""

    class Device(str):
        type = "cuda"

    model = llama(2)
    optimizer = chunkft.ChunkAdamW(model, chunks=2, weights="stream", device="cpu")
    monkeypatch.setattr(stream_of(model), "device", Device("elsewhere"))
    monkeypatch.setattr("chunkft.profiling.recording.Ledger", lambda model, device, *rest: device)
    recorder = Recorder(model, optimizer, lambda model, batch: None, iter([]))
    assert recorder.device == recorder.ledger == "elsewhere"
    optimizer.detach()
