"""The report of what paging moved, what of it was exposed, and how many chunks would hide it."""

import math
from dataclasses import replace

import pytest
from toy_models import mlp, mlp_loss, through_dict, train

import chunkft
from chunkft.optim.paging import PagingMeter
from chunkft.streaming import PagerStats

NOTHING = PagerStats(**{name: 0 for name in PagerStats.__dataclass_fields__ if not name.startswith("file_")})


def report_of(monkeypatch, seconds, chunks=4, steps=10, **counters):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = PagingMeter()
    now[0] += seconds
    return meter, meter.report([replace(NOTHING, **counters)], steps, chunks), now


def test_rates_shares_and_the_chunks_that_hide_the_link(monkeypatch):
    """20 GB in at 10 GB/s need 2 s, of which 1 s stuck out of a run of 1.5 s: 0.5 s of work hide a quarter of it."""
    _, report, _ = report_of(
        monkeypatch,
        seconds=1.5,
        loaded_bytes=20_000,
        stored_bytes=10_000,
        timed_loaded_bytes=5_000,
        load_seconds=0.5,
        timed_stored_bytes=10_000,
        store_seconds=0.5,
        exposed_seconds=1.0,
    )
    assert (report.load_rate, report.store_rate) == (10_000, 20_000)
    assert report.exposed_share == pytest.approx(1 / 1.5)
    assert report.hiding_chunks == 4 * 2 / 0.5
    assert "hidden from chunks=16 on" in str(report)


def test_a_hidden_link_allows_fewer_chunks_and_never_less_than_one(monkeypatch):
    counters = {
        "loaded_bytes": 1_000,
        "timed_loaded_bytes": 1_000,
        "load_seconds": 1.0,
    }
    assert report_of(monkeypatch, seconds=2.0, chunks=8, **counters)[1].hiding_chunks == 4
    assert report_of(monkeypatch, seconds=1e6, chunks=8, **counters)[1].hiding_chunks == 1


def test_nothing_timed_claims_nothing(monkeypatch):
    _, report, _ = report_of(monkeypatch, seconds=2.0, loaded_bytes=10)
    assert math.isnan(report.load_rate)
    assert report.hiding_chunks is None
    assert "hidden" not in str(report)


def test_a_report_covers_what_came_after_the_one_before(monkeypatch):
    meter, _, now = report_of(monkeypatch, seconds=2.0, loaded_bytes=10, steps=3)
    now[0] += 4.0
    report = meter.report([replace(NOTHING, loaded_bytes=25)], 8, 4)
    assert (report.steps, report.seconds, report.loaded_bytes) == (5, 4.0, 15)


@pytest.mark.parametrize("update", ["step", "backward"])
def test_what_moves_is_the_state_of_the_active_chunk_each_way(update):
    """From the second sweep on, every step loads and stores the state of its chunk once."""
    model = mlp()
    optimizer = chunkft.ChunkAdamW(
        model, chunks=2, interval=1, residency="stream", page_bytes=1024, update=update
    )
    train(model, optimizer, mlp_loss, range(2))
    optimizer.state_dict()  # waits for what is on its way
    optimizer.paging()
    train(model, optimizer, mlp_loss, range(2, 6))
    optimizer.state_dict()
    report = optimizer.paging()
    moments = 2 * 8 * sum(p.numel() for p in model.parameters())
    assert report.steps == 4
    # Pages are padded to 256 bytes a tensor, and pages for the next step may be on their way.
    assert moments <= report.stored_bytes <= 2 * moments
    assert moments / 2 <= report.loaded_bytes <= 2 * moments
    assert 0 <= report.exposed_share <= 1


def test_no_paging_no_report():
    assert chunkft.ChunkAdamW(mlp(), chunks=2).paging() is None


def test_loading_a_checkpoint_begins_the_count_anew():
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, state_device="paged")
    train(model, optimizer, mlp_loss, range(3))
    other = chunkft.ChunkAdamW(mlp(), chunks=2, state_device="paged")
    through_dict(optimizer, other, None)
    assert other.paging().stored_bytes == 0
