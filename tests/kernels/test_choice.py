"""``backend="auto"``: cuBLAS until measured otherwise; the model alone only where PyTorch has more to do."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft.kernels import choice, measured
from chunkft.kernels.choice import MEASURED_MARGIN, choose, choose_group
from chunkft.kernels.heuristics import Config, Problem, candidates, pick, predict, predict_torch
from chunkft.kernels.targets import TARGETS

H100, H200 = TARGETS["h100"], TARGETS["h200"]
SIZES = list(product((64, 1024, 16384), (8, 64, 512, 4096), (256, 4096)))
GROUP = Problem(16384, 192, 4096, described=False, parts=(64, 64, 64), shared=True)


def table(*measurements, family=90):
    return measured.Table(family, measured._by_kind(measurements))


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_without_measurements_one_product_is_cublas(target, monkeypatch):
    # whatever the model says
    monkeypatch.setattr(choice, "MODEL_MARGIN", 0.0)
    for tokens, rows, cols in SIZES:
        for change in ({}, {"row_shift": 3}, {"col_shift": 5}, {"described": False}, {"accumulate": True}):
            assert choose(Problem(tokens, rows, cols, **change), target) is None
        assert choose_group(Problem(tokens, rows, cols, parts=(rows,), shared=True), target) is None
        assert choose_group(Problem(tokens, 3 * rows, cols, parts=(rows,) * 3), target) is None


@pytest.mark.parametrize("blocks", [(1, 0), (0, 1), (64, 1), (1, 64)])
def test_single_indices_stay_with_pytorch(blocks, monkeypatch):
    monkeypatch.setattr(choice, "MODEL_MARGIN", 0.0)
    for tokens, rows, cols in SIZES:
        problem = Problem(tokens, rows, cols, row_block=blocks[0], col_block=blocks[1])
        assert choose(problem, H100) is None
        assert choose(problem, H100, norm=True) is None


def held_to_margin(monkeypatch, theirs, problem, choosing, **options):
    """Triton is taken just below the modelled gain over `theirs`, and not just above it."""
    config = pick(problem, H200, options.get("split", True))
    gain = theirs / predict(config, problem, H200).microseconds
    for margin, expected in ((gain * 0.99, config), (gain * 1.01, None)):
        monkeypatch.setattr(choice, "MODEL_MARGIN", margin)
        assert choosing(problem, H200, **options) == expected


def test_gathers_of_blocks_save_a_copy(monkeypatch):
    problem = Problem(16384, 4096, 512, row_block=64)
    held_to_margin(monkeypatch, predict_torch(problem, H200).microseconds, problem, choose)


def test_the_squared_norm_saves_a_pass_over_the_result(monkeypatch):
    problem = Problem(1024, 512, 4096)
    extra = choice.norm_microseconds(problem, H200)
    assert extra > 512 * 4096 * 2 / H200.bandwidth / 1e3
    theirs = predict_torch(problem, H200).microseconds + extra
    held_to_margin(monkeypatch, theirs, problem, choose, norm=True)


def test_groups_that_share_x_are_held_against_the_better_form_of_pytorch(monkeypatch):
    apart, joined = choice.one_by_one(GROUP, H200), choice.by_one_product(GROUP, H200)
    held_to_margin(monkeypatch, min(apart, joined), GROUP, choose_group)
    # few rows: X is read three times, or dY copied once
    assert joined < apart
    large = replace(GROUP, rows=3 * 11008, parts=(11008,) * 3)
    assert choice.one_by_one(large, H200) < choice.by_one_product(large, H200)
    held_to_margin(monkeypatch, choice.one_by_one(large, H200), large, choose_group)


def test_many_slices_in_one_launch_are_held_against_a_product_each(monkeypatch):
    ragged = Problem(1024, 8 + 200 + 64 + 33, 512, described=False, parts=(8, 200, 64, 33))
    held_to_margin(monkeypatch, choice.one_by_one(ragged, H200), ragged, choose_group)
    experts = Problem(512, 128 * 48, 2048, described=False, parts=(48,) * 128)
    held_to_margin(monkeypatch, choice.one_by_one(experts, H200), experts, choose_group, split=False)


def test_what_was_measured_decides_over_the_model(monkeypatch):
    for problem, choosing in ((Problem(16384, 4096, 512, row_block=64), choose), (GROUP, choose_group)):
        config = pick(problem, H200)
        for margin in (0.0, 1e9):
            monkeypatch.setattr(choice, "MODEL_MARGIN", margin)
            assert choosing(problem, H200, table((problem, config, MEASURED_MARGIN))) == config
            assert choosing(problem, H200, table((problem, config, 1.02))) is None


def test_measurements_of_groups_are_for_groups_that_share_x(monkeypatch):
    monkeypatch.setattr(choice, "MODEL_MARGIN", 1e9)
    known = table((GROUP, pick(GROUP, H200), 2.0))
    assert choose_group(GROUP, H200, known) is not None
    assert choose_group(replace(GROUP, shared=False), H200, known) is None


def test_experts_are_never_split(monkeypatch):
    problem = Problem(512, 96, 512, described=False, parts=(48,) * 2)
    split = Config(64, 128, 64, 4, 3, 2)
    monkeypatch.setattr(choice, "MODEL_MARGIN", 0.0)
    assert choose_group(problem, H200, table((problem, split, 2.0)), split=False) is None


def test_a_measured_configuration_that_is_illegal_here_decides_nothing():
    problem = Problem(4096, 512, 4096)
    illegal = Config(256, 256, 64, 16, 8, tma=True)
    assert choose(problem, H100, table((problem, illegal, 2.0))) is None


numbers = st.sampled_from([8, 48, 64, 90, 128, 250, 512, 1024, 2048, 4096, 5000, 16384])
problems = st.builds(
    Problem,
    tokens=numbers,
    rows=numbers,
    cols=numbers,
    out_itemsize=st.sampled_from([2, 4]),
    row_block=st.sampled_from([0, 0, 64]),
    row_shift=st.sampled_from([0, 0, 3]),
    described=st.booleans(),
    accumulate=st.booleans(),
)
measurements = st.lists(st.tuples(problems, st.floats(0.3, 3.0)), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(measurements, st.data())
def test_triton_is_never_taken_where_any_measurement_of_the_bucket_was_slow(pairs, data):
    known = table(*((p, next(candidates(p, H100)), speedup) for p, speedup in pairs))
    # the problems measured, and others of sizes near to theirs
    base = data.draw(st.sampled_from([p for p, _ in pairs]))
    nudge = data.draw(st.sampled_from([0.8, 0.95, 1.0, 1.1, 1.3, 2.0]))
    problem = replace(base, tokens=max(1, round(base.tokens * nudge)))
    same = [s for p, s in pairs if measured._kind(p) == measured._kind(problem)
            and measured._bucket(p) == measured._bucket(problem)]  # fmt: skip
    taken = [choose(problem, H100, known, norm=norm) for norm in (False, True)]
    if any(speedup < MEASURED_MARGIN for speedup in same):
        assert taken == [None, None]
    if taken[0] is not None and not problem.row_block:
        # in a bucket that was measured, or between two that agree
        assert known.find(problem, H100)[1] >= MEASURED_MARGIN
