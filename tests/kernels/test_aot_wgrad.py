"""The wgrad kernel compiles without spills, within shared memory, for every tile that the picker can choose."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from aot import TARGETS, check, compile_for

from chunkft.kernels.gpu.wgrad import wgrad_kernel
from chunkft.kernels.heuristics import (
    LIMITS,
    PREFERENCES,
    TILES_16BIT,
    TILES_IEEE,
    TILES_TF32,
    Config,
    Problem,
    shared_bytes,
)
from chunkft.kernels.targets import target_of

SIZES = ("outputs", "inputs", "rows", "cols", "dy_stride", "x_stride", "row_stride", "col_shift")
LOOSE = ("tokens", "per_split", "row_start", "row_shift", "col_start")


def report(sm, config, problem, *, dtype="bf16", out="bf16", heavy=True):
    """Compiled as the launcher would; ``heavy`` has split-K, accumulation, norms and a ragged number of tokens."""
    constexprs = {
        "col_stride": 1,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "SPLITS": 2 if heavy else 1,
        "ROW_BLOCK": problem.row_block,
        "COL_BLOCK": problem.col_block,
        "MASKED": heavy and not config.tma,
        "TMA": config.tma,
        "ACCUMULATE": heavy,
        "NORM": heavy,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "INTERPRETED": False,
    }
    if not heavy:
        constexprs |= {"partials": None, "counters": None}
    types = {"dy": f"*{dtype}", "x": f"*{dtype}", "out": f"*{out}", "norms": "*fp32"}
    if config.tma:
        types["dy"] = f"tensordesc<{dtype}[{config.block_k}, {config.block_m}]>"
        types["x"] = f"tensordesc<{dtype}[{config.block_k}, {config.block_n}]>"
    if heavy:
        types |= {"partials": "*fp32", "counters": "*i32"}
    for name, block in (("row_index", problem.row_block), ("col_index", problem.col_block)):
        if block:
            types[name] = "*i64"
        else:
            constexprs[name] = None
    types |= dict.fromkeys((*SIZES, *LOOSE), "i32")
    return compile_for(wgrad_kernel, types, constexprs, sm, config.num_warps, config.num_stages, LOOSE)


def reachable():
    """Every tile, by every way of reading, that the picker may take on each target."""
    for sm in TARGETS:
        for kind, tiles in (("bf16", TILES_16BIT), ("tf32", TILES_TF32), ("ieee", TILES_IEEE)):
            for tile in tiles:
                if tile.persistent:  # test_aot_wgrad_persistent.py
                    continue
                for described in (True, False):
                    problem = Problem(
                        4096,
                        4096,
                        4096,
                        2 if kind == "bf16" else 4,
                        2 if kind == "bf16" else 4,
                        described=described,
                        tf32=kind == "tf32",
                    )
                    config = replace(tile, tma=described and sm >= 90 and kind != "ieee")
                    if described and not config.tma:
                        continue
                    if all(test(config, problem, target_of(sm)) for test in (*LIMITS, *PREFERENCES)):
                        size = f"{config.block_m}x{config.block_n}x{config.block_k}x{config.num_stages}"
                        way = "tma" if config.tma else "pointers"
                        yield pytest.param(sm, config, problem, kind, id=f"{sm}-{kind}-{size}-{way}")


CASES = list(reachable())


@pytest.mark.parametrize(("sm", "config", "problem", "kind"), CASES)
def test_tiles_of_the_picker(sm, config, problem, kind):
    dtype = "bf16" if kind == "bf16" else "fp32"
    found = report(sm, config, problem, dtype=dtype, out=dtype)
    check(found)
    assert found.shared <= shared_bytes(config, problem, target_of(sm)), (
        "the picker counts on less than the kernel takes"
    )
    assert found.has("atom.global.gpu.acq_rel.add.u32")
    assert found.has("cp.async.bulk.tensor") == config.tma
    if not config.tma:
        sixteen_bytes = found.ptx.count("cp.async.cg.shared.global [") and ", 0x10" in found.ptx
        # wgmma and tcgen05 take tf32 operands in one order only, so that dY is transposed by copies of 4 bytes
        assert sixteen_bytes or (sm in (90, 100) and kind == "tf32")
        assert not found.has("ld.global.b16"), "a tile is not copied asynchronously"
    if kind != "ieee":
        assert found.has("wgmma") == (sm == 90)
        assert found.has("tcgen05.mma") == (sm == 100)
        assert found.has("mma.sync") == (sm not in (90, 100))


def test_there_is_a_tile_of_every_kind_for_every_target():
    seen = {(case.values[0], case.values[3], case.values[1].tma) for case in CASES}
    assert seen >= {(sm, kind, sm >= 90) for sm in TARGETS for kind in ("bf16", "tf32")}
    assert seen >= {(sm, "ieee", False) for sm in TARGETS}


FLAT, TALL, SMALL = Config(64, 128, 64, 4, 3), Config(128, 64, 64, 4, 3), Config(64, 64, 32, 8, 3)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize(
    ("config", "extra", "dtype", "out"),
    [
        (FLAT, {"row_block": 64}, "bf16", "bf16"),
        (SMALL, {"row_block": 8, "col_block": 64}, "bf16", "bf16"),
        (TALL, {"col_block": 8}, "fp16", "fp16"),
        (SMALL, {"row_block": 1, "col_block": 1}, "bf16", "bf16"),
    ],
    ids=["blocks-64", "blocks-8-64", "column-blocks-fp16", "indices"],
)
def test_gathers(sm, config, extra, dtype, out):
    tma = sm >= 90 and extra == {"row_block": 64}
    config = replace(config, tma=tma)
    problem = Problem(4096, 512, 4096, out_itemsize=4 if out == "fp32" else 2, **extra)
    found = report(sm, config, problem, dtype=dtype, out=out)
    check(found)
    assert all(test(config, problem, target_of(sm)) for test in (*LIMITS, *PREFERENCES))
    gathers_elements = 1 in extra.values()
    assert found.has("ld.global.b16") == gathers_elements
    assert found.has("cp.async.bulk.tensor") == tma
    assert found.has("cp.async.cg.shared.global") == (not tma and not gathers_elements)


@pytest.mark.parametrize("sm", TARGETS)
def test_the_plain_launch_has_no_atomics(sm):
    problem = Problem(4096, 4096, 4096)
    config = Config(64, 128, 64, 4, 3, tma=sm >= 90)
    light = report(sm, config, problem, heavy=False)
    check(light)
    assert not light.has("atom")
    assert light.has("st.global.v4.b32"), "the result is not stored in 16-byte pieces"


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_parts_are_released_and_acquired(sm):
    """The steps of test_split_protocol.py: store, barrier, add (release, acquire), barrier, read past L1."""
    found = report(sm, Config(64, 128, 64, 4, 3, tma=sm >= 90), Problem(4096, 4096, 4096))
    before, after = found.ptx.split("atom.global.gpu.acq_rel.add.u32")
    stored = before.rindex("st.global")
    assert "bar.sync" in before[stored:]
    read = after.index("ld.global.cg")
    assert "bar.sync" in after[:read]
    assert "st.global" not in after[:read]
    if sm == 90:
        before, after = found.sass().split("ATOMG.E.ADD.STRONG.GPU")
        assert before.rindex("MEMBAR.ALL.GPU") > before.rindex("STG"), (
            "nothing brings the part to memory first"
        )
        assert after.index("CCTL.IVALL") < after.index("LDG.E.128.STRONG.GPU"), "old values may lie in L1"
