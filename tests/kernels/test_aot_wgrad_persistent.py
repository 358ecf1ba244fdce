"""The persistent wgrad kernel compiles without spills, as one loop over the tiles and tokens of a program."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton.language as tl
from aot import TARGETS, check, compile_for

from chunkft.kernels.gpu.wgrad_persistent import wgrad_persistent_kernel
from chunkft.kernels.heuristics import LIMITS, PREFERENCES, TILES_16BIT, Problem, parts, shared_bytes
from chunkft.kernels.targets import target_of
from chunkft.kernels.triton_persistent import is_specialized

SIZES = ("cols", "row_stride", "col_shift")
LOOSE = ("tokens", "rows", "row_start", "row_shift", "col_start")
TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
PROBLEM = Problem(4096, 8192, 8192)


def compiled(sm, config, *, out="bf16", described=True, accumulate=False):
    """As the launcher would; what it found is within what the picker counted on."""
    problem = replace(PROBLEM, out_itemsize=2 if out == "bf16" else 4, accumulate=accumulate)
    count = parts(config, problem)
    constexprs = {
        "col_stride": 1,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "PARTS": count,
        "DTYPE": TYPES[out],
        "DESCRIBED": described,
        "ACCUMULATE": accumulate,
        "SPECIALIZED": is_specialized(sm, described),
        "PRECISION": "ieee",
        "INTERPRETED": False,
    }
    types = {
        "dy": f"tensordesc<bf16[{config.block_k}, {config.block_m}]>",
        "x": f"tensordesc<bf16[{config.block_k}, {config.block_n}]>",
        "out": f"tensordesc<{out}[{config.block_m}, {config.block_n // count}]>" if described else f"*{out}",
    }
    types |= dict.fromkeys((*SIZES, *LOOSE), "i32")
    found = compile_for(
        wgrad_persistent_kernel, types, constexprs, sm, config.num_warps, config.num_stages, LOOSE
    )
    check(found)
    assert found.shared <= shared_bytes(config, problem, target_of(sm)), (
        "the picker counts on less than the kernel takes"
    )
    assert found.has("wgmma.mma_async") == (sm == 90)
    assert found.has("tcgen05.mma") == (sm == 100)
    assert found.has("mma.sync") == (sm == 120)
    assert "cp.async.bulk.tensor.2d.shared" in found.ptx, "operands do not come by TMA"
    assert ("cp.async.bulk.tensor.2d.global" in found.ptx) == described, "the result is not stored by TMA"
    assert found.has("st.global") == (not described)
    # producer and consumer warps share out the registers
    assert found.has("setmaxnreg") == is_specialized(sm, described)
    return found


def reachable():
    for sm in TARGETS:
        for tile in TILES_16BIT:
            config = replace(tile, tma=True)
            if tile.persistent and all(t(config, PROBLEM, target_of(sm)) for t in (*LIMITS, *PREFERENCES)):
                size = f"{config.block_m}x{config.block_n}x{config.block_k}x{config.num_stages}"
                yield pytest.param(sm, config, id=f"{sm}-{size}")


CASES = list(reachable())


@pytest.mark.parametrize(("sm", "config"), CASES)
def test_tiles_of_the_picker(sm, config):
    compiled(sm, config)
    compiled(sm, config, out="fp32", accumulate=True)


@pytest.mark.parametrize(("sm", "config"), CASES)
def test_results_that_no_descriptor_stores(sm, config):
    compiled(sm, config, described=False, accumulate=True)


@pytest.mark.parametrize(("sm", "config"), [case for case in CASES if case.values[1] == CASES[0].values[1]])
def test_sums_in_place_of_the_same_dtype(sm, config):
    compiled(sm, config, accumulate=True)


def test_there_is_a_tile_for_every_target_with_tma():
    assert {case.values[0] for case in CASES} == {90, 100, 120}


def test_the_next_tile_is_loaded_before_this_one_is_stored():
    """On 9.0: one loop, barriers made before it, and its wait for products leaves the last one in flight."""
    config = CASES[0].values[1]
    ptx = compiled(90, config).ptx
    assert "Parent Loop" not in ptx, "the loops over tiles and tokens are two"
    before, loop = ptx.split("Inner Loop Header", 1)
    assert before.count("mbarrier.init") == config.num_stages
    assert "mbarrier.init" not in loop
    product = loop.index("wgmma.mma_async")
    loaded = loop.index("cp.async.bulk.tensor.2d.shared")
    stored = loop.index("cp.async.bulk.tensor.2d.global")
    assert product < loaded < stored
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", loop[product:loaded])
    assert waits == ["1"], "the step's product is waited for before the next loads are issued"
