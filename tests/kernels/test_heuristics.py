"""The picker: only legal configurations, one for every problem."""

from dataclasses import replace
from itertools import product

import pytest

from chunkft.kernels import heuristics
from chunkft.kernels.heuristics import (
    LIMITS,
    PREFERENCES,
    Config,
    Problem,
    broken_limits,
    candidates,
    pick,
    predict,
    predict_torch,
    roofline,
)
from chunkft.kernels.targets import TARGETS, family, shared_memory_limit, target_of

H100, A100, RTX4090, RTX5090 = (TARGETS[name] for name in ("h100", "a100", "rtx4090", "rtx5090"))
KINDS = [(2, False), (4, True), (4, False)]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
@pytest.mark.parametrize(("itemsize", "tf32"), KINDS, ids=["16bit", "tf32", "fp32"])
def test_every_problem_gets_a_legal_configuration(target, itemsize, tf32):
    shapes = product((0, 1, 3000), (1, 200, 4096), (300,))
    for (tokens, rows, cols), row_block, col_block, described in product(
        shapes, (0, 1, 8), (0, 64), (True, False)
    ):
        problem = Problem(
            tokens, rows, cols, itemsize, itemsize, row_block, col_block, 3, 5, described, tf32=tf32
        )
        config = pick(problem, target)
        assert not broken_limits(config, problem, target)
        assert all(test(config, problem, target) for test in PREFERENCES)
        assert pick(problem, target, split=False).splits == 1


@pytest.mark.parametrize(
    ("change", "problem", "target", "broken"),
    [
        ({"block_m": 48}, {}, H100, "is_power_of_two"),
        ({"block_k": 8}, {}, H100, "is_power_of_two"),
        ({"num_warps": 3}, {}, H100, "has_warps"),
        ({"num_stages": 9, "block_k": 16, "block_n": 16}, {}, H100, "has_warps"),
        ({"num_stages": 5}, {}, RTX4090, "fits_shared_memory"),
        ({"tma": True}, {}, A100, "has_descriptors"),
        ({"tma": True}, {"described": False}, H100, "has_descriptors"),
        ({"tma": True}, {"row_block": 8}, H100, "has_descriptors"),
        ({"tma": True}, {"col_block": 64}, H100, "has_descriptors"),
        ({"persistent": True}, {}, H100, "can_persist"),
        ({"persistent": True, "tma": True, "splits": 2}, {}, H100, "can_persist"),
        ({"persistent": True, "tma": True}, {"row_block": 64}, H100, "can_persist"),
        ({"persistent": True, "tma": True, "block_n": 256}, {}, RTX5090, "fits_shared_memory"),
    ],
)
def test_each_limit_is_named(change, problem, target, broken):
    base = Config(64, 128, 64, 4, 3)
    assert not broken_limits(base, Problem(4096, 512, 4096), target)
    assert broken in broken_limits(replace(base, **change), Problem(4096, 512, 4096, **problem), target)


@pytest.mark.parametrize(
    ("config", "problem", "test"),
    [
        (Config(128, 256, 64, 4, 3), Problem(4096, 4096, 4096), heuristics.fits_registers),
        (Config(128, 128, 16, 8, 3), Problem(64, 64, 64, 4, 4), heuristics.fits_registers_of_fma),
        (Config(128, 256, 64, 8, 3), Problem(4096, 4096, 4096), heuristics.pointers_leave_registers),
        (Config(128, 128, 64, 8, 3), Problem(64, 512, 64, row_block=8), heuristics.pointers_leave_registers),
        (Config(64, 128, 64, 4, 3), Problem(4096, 64, 4096, row_block=1), heuristics.gathers_fit),
        (Config(64, 64, 32, 8, 3), Problem(4096, 64, 4096), heuristics.gathers_fit),
        (Config(64, 128, 64, 4, 3), Problem(4096, 64, 4096), heuristics.uses_descriptors),
        (Config(32, 128, 64, 4, 3, tma=True), Problem(4096, 32, 4096), heuristics.fills_tensor_core),
        (Config(128, 256, 64, 8, 3, tma=True), Problem(4096, 4096, 4096), heuristics.has_depth),
        (
            Config(128, 128, 64, 8, 3, tma=True, persistent=True),
            Problem(4096, 4096, 4096),
            heuristics.has_depth,
        ),
        (Config(128, 256, 64, 8, 4), Problem(4096, 4096, 4096, described=False), heuristics.has_depth),
        (
            Config(128, 256, 64, 8, 4, tma=True, persistent=True),
            Problem(4096, 1024, 4096),
            heuristics.persistence_has_work,
        ),
        (
            Config(128, 128, 64, 8, 3, persistent=True),
            Problem(4096, 8192, 8192, described=False, parts=(4096, 4096)),
            heuristics.persistence_has_work,
        ),
        (Config(64, 128, 64, 4, 3, 8), Problem(1024, 64, 128), heuristics.splits_have_work),
        (Config(64, 128, 64, 4, 3, 7), Problem(64 * 36, 64, 128), heuristics.splits_have_work),
        (Config(64, 128, 64, 4, 3, 2), Problem(4096, 4096, 4096), heuristics.splits_are_needed),
        (Config(128, 256, 64, 8, 3, 8), Problem(65536, 4096, 4096), heuristics.fits_workspace),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_preference_refuses_what_it_is_for(config, problem, test):
    assert not test(config, problem, H100)
    assert config not in set(candidates(problem, H100))


def test_blocks_of_64_are_read_by_descriptor_and_smaller_ones_through_pointers():
    assert pick(Problem(4096, 512, 4096, row_block=64), H100).tma
    assert pick(Problem(4096, 512, 4096, row_block=64), H100).block_m == 64
    assert not pick(Problem(4096, 512, 4096, row_block=8), H100).tma


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_idle_multiprocessors_are_put_to_work(target):
    assert pick(Problem(65536, 64, 512), target).splits > 1
    assert pick(Problem(65536, 8192, 8192), target).splits == 1


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_no_prediction_beats_the_roofline(target):
    for tokens, rows, cols in product((16, 1024, 16384), (8, 64, 512, 4096), (256, 4096)):
        for block in (0, 64):
            problem = Problem(tokens, rows, cols, row_block=block)
            least = roofline(problem, target).microseconds
            assert predict(pick(problem, target), problem, target).microseconds > least
            assert predict_torch(problem, target).microseconds > least


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_itemsize", [2, 4])
def test_many_tiles_are_walked_over_where_there_is_tma(target, accumulate, out_itemsize):
    problem = Problem(4096, 8192, 8192, out_itemsize=out_itemsize, accumulate=accumulate)
    config = pick(problem, target)
    assert config.persistent == (target.capability >= 90)
    if config.persistent:
        assert config.num_stages == (3 if target.capability == 120 else 4)
        assert heuristics.part_bytes(config, problem) <= 32 << 10
        # neither a gather nor a group can
        assert not pick(replace(problem, row_block=64), target).persistent
        assert not pick(replace(problem, described=False), target).persistent


def test_each_persistent_tile_is_chosen_for_some_slice():
    seen = set()
    for target in (H100, RTX5090):
        for rows, cols in product(range(256, 32768, 1408), (128, 1152, 4096)):
            config = pick(Problem(4096, rows, cols), target)
            seen |= {replace(config, tma=False)} if config.persistent else set()
    assert seen == {config for config in heuristics.TILES_16BIT if config.persistent}


def test_a_part_is_at_least_sixteen_columns():
    config = Config(256, 32, 64, 8, 4, tma=True, persistent=True)
    problem = Problem(4096, 512, 4096, out_itemsize=4, accumulate=True)
    assert heuristics.parts(config, problem) == 2


def test_slices_of_their_own_have_tiles_of_their_own():
    config = Config(64, 128, 64, 4, 3)
    assert heuristics.tiles(config, Problem(64, 130, 128)) == 3
    assert heuristics.tiles(config, Problem(64, 130, 128, parts=(10, 20, 100))) == 4
    assert heuristics.tiles(config, Problem(64, 128, 128, row_shift=1, col_shift=1)) == 6


def test_devices_are_known_by_name_or_by_family():
    assert target_of(90, "NVIDIA H200").name == "h200"
    assert target_of(90, "NVIDIA GH9000", 99).name == "h100"
    assert target_of(90, "NVIDIA GH9000", 99).multiprocessors == 99
    assert target_of(86, "NVIDIA GeForce RTX 3090").name == "rtx3090"
    assert [family(c) for c in (80, 86, 87, 89, 90, 100, 103, 120, 121)] == [
        80,
        86,
        86,
        89,
        90,
        100,
        100,
        120,
        120,
    ]
    assert shared_memory_limit(103) == 232_448
    for old in (75, 70, 110):
        with pytest.raises(ValueError, match=r"compute capability .* is not supported"):
            family(old)


def test_limits_and_preferences_are_distinct():
    assert not set(LIMITS) & set(PREFERENCES)
