"""The arithmetic model of many ranks: cases worked out by hand, bounds, and how it changes with ranks and chunks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from bench import common, scale_table
from bench.scale_model import (
    CHUNKED,
    METHODS,
    SHAPES,
    Setting,
    Shape,
    Weight,
    buckets,
    gathers,
    largest_part,
    memory,
    own_bound,
    traffic,
    windows,
)
from bench.scale_time import CLUSTERS, exchange, finest, fixed_batch, message_bytes, ring, seconds
from chunkft.cli.presets import config_of_preset, preset_named

# 8 columns: block 64 + 32 + 32 + 64 + 3 * 96 + 16 = 496, tables 2 * 160, norm 8
SMALL = Shape("small", layers=3, hidden=8, intermediate=12, kv=4, vocab=20)
RANKS = (1, 2, 3, 8, 64, 1024)


def test_sizes_are_those_of_the_published_models():
    assert [shape.numel for shape in SHAPES.values()] == [8_030_261_248, 70_553_706_496, 405_853_388_800]
    assert SMALL.numel == sum(weight.numel for weight in SMALL.stream) == 3 * 496 + 2 * 160 + 8


@pytest.mark.parametrize("name", ["8B", "70B"])
def test_shapes_are_those_that_transformers_builds_from_the_presets(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of_preset(preset_named(name)))
    built = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert built == sorted((w.rows, w.columns) if w.columns > 1 else (w.rows,) for w in SHAPES[name].stream)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_windows_hold_every_element_once_and_are_nearly_equal(chunks, interleaved):
    for shape in (SMALL, SHAPES["8B"]):
        sizes = [sum(piece.numel for piece in chunk) for chunk in windows(shape, chunks, interleaved)]
        assert sum(sizes) == shape.numel
        widest = max(weight.columns for weight in shape.stream)
        if not interleaved:
            assert max(sizes) - min(sizes) <= 2 * widest + shape.hidden


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_sends_nothing_and_waits_for_nobody(method):
    setting = Setting(SMALL, method, 1, chunks=3)
    assert traffic(setting).total == 0
    for cluster in CLUSTERS.values():
        found = seconds(setting, cluster)
        assert found.step == found.compute
        assert found.bound == "compute"


def test_replicas_by_hand():
    """Two ranks, one chunk in one bucket: half of its 1,816 elements leaves with 30 headers, 912 of 908 come back."""
    setting = Setting(SMALL, "replicas", 2, chunks=1)
    slices = 3 * 9 + 3
    half = largest_part(SMALL.stream, 2)
    assert half == 912  # of 908 as whole rows of 8
    assert traffic(setting).gradients == 2 * (1816 / 2 + slices)
    assert traffic(setting).weights == 2 * half
    assert traffic(setting).gathers == 0


def test_shards_by_hand():
    """Three ranks: 20, 8 and 4 rows are padded to 21, 9 and 6; all blocks come twice, the outer group once."""
    setting = Setting(SMALL, "fsdp2", 3, chunks=1)
    block = 9 * 8 + 2 * 6 * 8 + 9 * 8 + 2 * 12 * 8 + 9 * 12 + 2 * 9
    assert gathers(setting) == pytest.approx(2 * 2 / 3 * (6 * block + 2 * 21 * 8 + 9))
    assert traffic(setting).weights == 0
    assert traffic(setting).gradients == pytest.approx(2 * (2 / 3 * 1816 + 2 * 30))


def test_a_backward_pass_gathers_the_blocks_that_it_reaches_and_one_ahead():
    # windows begin in the table, in block 0 and in block 1, and in block 2
    assert [SMALL.reached(k, 4) for k in range(4)] == [3, 3, 2, 1]
    setting = Setting(SMALL, "fsdp2", 2, chunks=4)
    block, rest = 496, 2 * 160 + 8
    assert gathers(setting) == pytest.approx(2 / 2 * (rest + block * (3 + (3 + 3 + 3 + 2) / 4)))
    assert SHAPES["8B"].reached(63, 64) == 0  # nothing but the head


def test_copies_of_shards_add_up_their_sums_in_fp32():
    setting = Setting(SMALL, "hybrid", 8, chunks=1, shard=4)
    inside = 2 * (3 / 4 * 1816 + 3 * 30)
    assert traffic(setting).gradients == pytest.approx(inside + 2 * 1 / 2 * 4 * 1816 / 4)
    alone = Setting(SMALL, "fsdp2", 4, chunks=1)
    assert traffic(setting).gathers == traffic(alone).gathers
    assert memory(setting).host == memory(alone).host


def test_dense_methods_by_their_papers():
    n, ranks = SMALL.numel, 4
    assert traffic(Setting(SMALL, "ddp", ranks)).total == pytest.approx(2 * 2 * n * 3 / 4)
    assert traffic(Setting(SMALL, "zero1", ranks)).total == traffic(Setting(SMALL, "ddp", ranks)).total
    held = {method: memory(Setting(SMALL, method, ranks)) for method in ("ddp", "zero1", "zero3")}
    model_states = {m: h.weights + h.gradients + h.state for m, h in held.items()}
    assert model_states == {"ddp": 16 * n, "zero1": (4 + 12 / ranks) * n, "zero3": 16 * n / ranks}
    three = traffic(Setting(SHAPES["70B"], "zero3", 64))
    whole = 2 * SHAPES["70B"].numel * 63 / 64
    tables = 2 * 2 * SHAPES["70B"].rest[0].numel * 63 / 64  # are not gathered again
    assert three.total == pytest.approx(3 * whole - tables, rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_sent_stays_below_what_is_promised(name):
    for ranks in (2, 8, 64, 256, 1024):
        for method in ("replicas", "fsdp2"):
            setting = Setting(SHAPES[name], method, ranks)
            assert traffic(setting).own <= 1.02 * own_bound(setting), (ranks, method)


def test_interleaved_chunks_of_replicas_break_the_promise_on_many_ranks():
    """Parts of a rank are whole rows, and each rank sends as much as the one that has most."""
    setting = Setting(SHAPES["8B"], "replicas", 1024, interleaved=True)
    assert traffic(setting).own > 1.2 * own_bound(setting)
    assert traffic(replace(setting, ranks=64)).own <= 1.02 * own_bound(setting)


@pytest.mark.parametrize("name", ["8B", "70B"])
@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_bytes_are_those_of_the_buckets_that_chunkft_makes(name, ranks):
    from chunkft.autograd import Slice
    from chunkft.parallel.owners import make_buckets

    setting = Setting(SHAPES[name], "replicas", ranks)
    gradients = rows = 0
    for chunk in setting.sweep:
        slices = [
            Slice(str(i), 0 if w.columns > 1 else None, 0, w.rows, (w.rows, w.columns)[: 1 + (w.columns > 1)])
            for i, w in enumerate(chunk)
        ]
        made = make_buckets(slices, ranks, lambda piece: (torch.bfloat16, torch.device("cpu")))
        assert [len(bucket.leaves) for bucket in made] == [len(bucket) for bucket in buckets(chunk, 2)]
        for bucket in made:
            numels = bucket.numels()
            # of all ranks together: everything but their own parts, and a header for each other rank
            gradients += 2 * ((ranks - 1) / ranks * sum(numels) + (ranks - 1) * len(bucket.leaves))
            rows += 2 * (ranks - 1) * max(numels)
    assert traffic(setting).gradients == pytest.approx(gradients / setting.chunks, rel=1e-6)
    assert traffic(setting).weights == pytest.approx(rows / setting.chunks, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_more_ranks_send_more_and_hold_less(method):
    settings = [Setting(SHAPES["8B"], method, ranks) for ranks in RANKS if ranks != 3 or method != "hybrid"]
    sent = [traffic(setting).total for setting in settings]
    assert sent == sorted(sent)
    assert all(w >= v for v, w in itertools.pairwise(sent))
    held = [memory(setting) for setting in settings]
    for kind in ("weights", "state", "host"):
        sizes = [getattr(each, kind) for each in held]
        assert sizes == sorted(sizes, reverse=True), kind
    if method != "ddp":
        assert held[-1].state < held[0].state


@pytest.mark.parametrize("method", CHUNKED)
def test_more_chunks_send_and_hold_less(method):
    settings = [Setting(SHAPES["8B"], method, 16, chunks=k) for k in (1, 4, 16, 64, 256)]
    own = [traffic(setting).own for setting in settings]
    assert own == sorted(own, reverse=True)
    assert own[0] / own[-1] == pytest.approx(256, rel=0.01)
    device = [memory(setting).device for setting in settings]
    assert device == sorted(device, reverse=True)
    assert len({memory(setting).host for setting in settings}) == 1
    steps = [seconds(setting, CLUSTERS["modest"]).step for setting in settings]
    assert steps == sorted(steps, reverse=True)


def test_computation_has_a_floor_that_chunks_do_not_lower():
    """Forward, and for half of the blocks recompute and gradients of inputs: 2 + 4 / 2 of the 8 of full training."""
    fast = CLUSTERS["fast"]
    full = seconds(Setting(SHAPES["70B"], "zero3", 1), fast).compute
    shares = [
        seconds(Setting(SHAPES["70B"], "fsdp2", 1, chunks=k), fast).compute / full for k in (1, 32, 1024)
    ]
    assert shares[0] == pytest.approx(1)
    assert 0.5 < shares[2] < shares[1] < 0.53


def test_70b_on_two_cards_of_80_gib():
    held = memory(Setting(SHAPES["70B"], "fsdp2", 2, 128, 1024, streamed=True))
    gib = 2**30
    assert held.weights / gib == pytest.approx(65.7, abs=0.05)
    assert 2 * SHAPES["70B"].block_numel / gib == pytest.approx(1.6, abs=0.01)
    assert held.gathered / gib == pytest.approx(2 * 1.594 + 2 * 1.957, abs=0.01)
    assert held.device / gib < 79
    apart = memory(Setting(SHAPES["70B"], "fsdp2", 2, 128, 1024, streamed=True, apart=True))
    assert held.gathered - apart.gathered == pytest.approx(
        2 * (SHAPES["70B"].block_numel + SHAPES["70B"].rest[0].numel), rel=1e-3
    )


def test_collectives_take_the_slower_of_their_links():
    fast = CLUSTERS["fast"]
    assert ring(fast.inside, 8, fast) == 1
    assert ring(fast.between * 8, 16, fast) == pytest.approx(max(1, 8 * fast.between / fast.inside))
    # of what a rank of 16 sends to 15 others 8 are elsewhere
    assert exchange(15 * fast.between, 16, fast) == pytest.approx(8)
    assert exchange(fast.inside, 8, fast) == 1
    found = seconds(Setting(SHAPES["8B"], "fsdp2", 1024, chunks=4096), CLUSTERS["fast"])
    assert found.latency > found.gradients  # short messages


def test_a_fixed_batch_ends_in_gathers():
    base = Setting(SHAPES["70B"], "fsdp2", 8)
    bounds = [
        seconds(fixed_batch(replace(base, ranks=ranks), 1 << 18), CLUSTERS["fast"]).bound
        for ranks in (8, 64, 1024)
    ]
    assert bounds == ["compute", "compute", "gathers"]
    times = [
        seconds(fixed_batch(replace(base, ranks=ranks), 1 << 18), CLUSTERS["fast"]).step
        for ranks in (256, 1024)
    ]
    assert times[1] > times[0] / 2  # four times the ranks
    assert fixed_batch(base, 4).tokens == 1


def test_the_finest_cut_by_hand():
    """Two ranks have 4, 2, 2, 4, 6, 6 and 4 rows of a block, and 10 of each table."""
    assert finest(Setting(SMALL, "fsdp2", 2)) == 3 * 28 + 20
    assert finest(Setting(SMALL, "fsdp2", 2, interleaved=True)) == 2
    assert finest(Setting(SMALL, "fsdp2", 2, interleaved=True), rows=4) == 0
    assert finest(Setting(SMALL, "fsdp2", 64)) == 0


def test_messages_shrink_with_ranks():
    sizes = [message_bytes(Setting(SHAPES["8B"], "replicas", ranks)) for ranks in (2, 4, 1024)]
    assert sizes[0] == 2 * sizes[1] == 512 * sizes[2]
    assert buckets([Weight(1 << 12, 1 << 12)] * 3, 2) == [[Weight(1 << 12, 1 << 12)]] * 3  # each fills one
    assert [len(bucket) for bucket in buckets([Weight(1 << 11, 1 << 11)] * 5, 2)] == [4, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "ddq"}, "method='ddq' is not known; allowed are replicas"),
        ({"ranks": 0}, "ranks=0 is not allowed"),
        ({"chunks": True}, "chunks=True is not allowed"),
        ({"method": "hybrid", "ranks": 12}, "shard=8 does not divide ranks=12"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Setting(**{"shape": SMALL, "method": "fsdp2", "ranks": 2} | changes)
    with pytest.raises(ValueError, match="method='ddp' has no bound"):
        own_bound(Setting(SMALL, "ddp", 2))


def test_the_committed_figures_are_those_of_the_model():
    committed = json.loads((common.RESULTS / "scale-predicted.json").read_text())
    for row in committed["cases"]:
        if row["ranks"] in (1, 3, 16, 1024) and row["model"] != "405B":
            setting = Setting(
                SHAPES[row["model"]], row["method"], row["ranks"], committed["chunks"], row["tokens"]
            )
            assert scale_table.case(setting) == row
    assert committed["two_cards"] == scale_table.two_cards()
