"""The AdamW kernel compiles for every target without spills, and moves memory in 16-byte pieces."""

import pytest

pytest.importorskip("triton")

import triton.language as tl
from aot import NEWEST, TARGETS, check, compile_for

from chunkft.kernels.gpu.adamw import BLOCK, LOOPS, SLOTS_MAX, SLOTS_MIN, WARPS, adamw_kernel

TYPES = {
    "table": "*i64",
    "starts": "*i64",
    "found_inf": "*fp32",
    "grad_scale": "*fp32",
    "clip_factor": "*fp32",
    "pull": "fp32",
    "beta2": "fp32",
    "keep2": "fp32",
    "eps": "fp32",
}
# parameter, gradient, master
KINDS = {
    "fp32": (tl.float32, tl.float32, "none"),
    "bf16-none": (tl.bfloat16, tl.bfloat16, "none"),
    "bf16-fp32": (tl.bfloat16, tl.bfloat16, "fp32"),
    "bf16-residual": (tl.bfloat16, tl.bfloat16, "residual"),
    "bf16-stochastic": (tl.bfloat16, tl.bfloat16, "stochastic"),
    "fp16-fp32": (tl.float16, tl.float16, "fp32"),
}


def compiled(kind, sm, guarded=True, slots=SLOTS_MIN, moment=tl.float32):
    parameter, gradient, master = KINDS[kind]
    constexprs = {
        "DTYPES": (parameter, gradient, moment, moment),
        "MASTER": master,
        "WATCHED": guarded,
        "SCALED": guarded,
        "CLIPPED": guarded,
        "SLOTS": slots,
        "SIZE": BLOCK,
        "REPEAT": LOOPS,
        "INTERPRETED": False,
    }
    return compile_for(adamw_kernel, TYPES, constexprs, sm, num_warps=WARPS)


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_master_compiles_for_every_target(kind, sm):
    report = compiled(kind, sm)
    check(report)
    assert report.has("ld.global.v4.b32"), "the moments are not read in pieces of 16 bytes"
    assert report.has("st.global.v4.b32"), "the moments are not written in pieces of 16 bytes"
    # Triton 3.6 takes up to 137 registers for some masters: 3 blocks a multiprocessor.
    assert report.registers <= (96 if NEWEST else 137), (
        "fewer than 5 blocks of 128 threads would fit a multiprocessor"
    )


def test_plain_and_crowded_launches_compile_too():
    check(compiled("fp32", 90, guarded=False))
    check(compiled("bf16-residual", 90, slots=SLOTS_MAX))
    check(compiled("bf16-none", 90, moment=tl.bfloat16))
