"""The kernels of grouped_wgrad and expert_wgrad compile without spills for the tiles that the picker can choose."""

import pytest

pytest.importorskip("triton")

from aot import TARGETS, check, compile_for

from chunkft.kernels.gpu.grouped_wgrad import expert_kernel, grouped_kernel
from chunkft.kernels.heuristics import LIMITS, PREFERENCES, TILES_16BIT, Config, Problem
from chunkft.kernels.targets import target_of

TUPLES = ("dy_pitches", "x_pitches", "out_pitches", "outputs", "inputs", "starts", "shifts", "counts")
LOOSE = ("tokens", "per_split", "col_start", *TUPLES)


def grouped(sm, config, groups, aligned=True):
    types = dict.fromkeys(TUPLES, ("i32",) * groups) | dict.fromkeys(
        ("dys", "xs", "outs"), ("*bf16",) * groups
    )
    types |= {"partials": "*fp32", "counters": "*i32"}
    sizes = ("tokens", "per_split", "tiles_m", "cols", "col_start", "col_shift")
    types |= dict.fromkeys(sizes, "i32")
    constexprs = {
        "GROUPS": groups,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "SPLITS": 2,
        "ALIGNED": aligned,
        "OUTS_ALIGNED": aligned,
        "MASKED": True,
        "ACCUMULATE": True,
        "PRECISION": "ieee",
        "INTERPRETED": False,
    }
    unaligned = LOOSE if aligned else (*LOOSE, "dys")
    return compile_for(grouped_kernel, types, constexprs, sm, config.num_warps, config.num_stages, unaligned)


def expert(sm, config):
    names = (
        "outputs",
        "inputs",
        "rows",
        "cols",
        "dy_stride",
        "x_stride",
        "expert_stride",
        "row_stride",
        "col_shift",
    )
    loose = ("tokens", "first_expert", "row_start", "row_shift", "col_start")
    types = {"dy": "*bf16", "x": "*bf16", "out": "*bf16", "offsets": "*i32"} | dict.fromkeys(
        (*names, *loose), "i32"
    )
    constexprs = {
        "col_stride": 1,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "ACCUMULATE": True,
        "PRECISION": "ieee",
        "INTERPRETED": False,
    }
    return compile_for(expert_kernel, types, constexprs, sm, config.num_warps, config.num_stages, loose)


def tiles(problem):
    for sm in TARGETS:
        for config in TILES_16BIT:
            if all(test(config, problem, target_of(sm)) for test in (*LIMITS, *PREFERENCES)):
                name = f"{sm}-{config.block_m}x{config.block_n}x{config.block_k}"
                yield pytest.param(sm, config, id=name)


def looks_right(found, sm):
    check(found)
    assert found.has("cp.async.cg.shared.global")
    assert not found.has("ld.global.b16"), "a tile is not copied asynchronously"
    assert found.has("wgmma") == (sm == 90)
    assert found.has("tcgen05.mma") == (sm == 100)


@pytest.mark.parametrize(("sm", "config"), tiles(Problem(4096, 4096, 4096, described=False)))
def test_three_slices_that_share_an_input(sm, config):
    looks_right(grouped(sm, config, 3), sm)


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_sixteen_slices(sm):
    looks_right(grouped(sm, Config(64, 128, 64, 4, 3), 16), sm)


def test_slices_that_are_not_aligned_are_read_element_by_element():
    assert grouped(80, Config(64, 64, 32, 8, 3), 2, aligned=False).has("ld.global.b16")


@pytest.mark.parametrize(("sm", "config"), tiles(Problem(4096, 4096, 4096, described=False)))
def test_experts(sm, config):
    looks_right(expert(sm, config), sm)
