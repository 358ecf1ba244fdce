"""The harness sees what it is there to see: spills, too much shared memory, instructions."""

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from aot import TARGETS, check, compile_for, table


@triton.jit
def _square(a, b, c, size, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    at = tl.arange(0, SIZE)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, size, DEPTH):
        left = tl.load(a + (k + depth)[:, None] * SIZE + at[None, :])  # [BK, BM]
        right = tl.load(b + (k + depth)[:, None] * SIZE + at[None, :])  # [BK, BN]
        total = tl.dot(tl.trans(left), right, total)
    tl.store(c + at[:, None] * SIZE + at[None, :], total)


TYPES = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "size": "i32"}


@pytest.mark.parametrize("sm", TARGETS)
def test_a_product_compiles_for_every_target(sm):
    report = compile_for(_square, TYPES, {"SIZE": 64, "DEPTH": 32}, sm)
    check(report)
    assert 0 < report.registers <= 255
    assert report.shared > 0
    assert report.has("cp.async")
    assert report.has("wgmma") == (sm == 90)
    assert report.has("tcgen05") == (sm == 100)
    assert f"| _square | {sm} |" in table()


def test_spills_are_seen():
    report = compile_for(_square, TYPES, {"SIZE": 256, "DEPTH": 32}, 80, num_warps=4)
    assert report.spills > 0
    with pytest.raises(AssertionError, match="spills"):
        check(report)


def test_too_much_shared_memory_is_seen():
    report = compile_for(_square, TYPES, {"SIZE": 128, "DEPTH": 128}, 89, num_warps=8, num_stages=4)
    assert report.shared > 101_376
    with pytest.raises(AssertionError, match="the limit is 101376"):
        check(report)


def test_alignment_changes_the_code():
    aligned = compile_for(_square, TYPES, {"SIZE": 64, "DEPTH": 32}, 80)
    unaligned = compile_for(_square, TYPES, {"SIZE": 64, "DEPTH": 32}, 80, unaligned=["a", "b"])
    assert aligned.has("cp.async.cg.shared.global")
    assert not unaligned.has("cp.async.cg.shared.global")


def test_forgotten_arguments_are_named():
    with pytest.raises(AssertionError, match=r"_square: arguments \['size'\]"):
        compile_for(_square, {k: v for k, v in TYPES.items() if k != "size"}, {"SIZE": 64, "DEPTH": 32}, 80)
