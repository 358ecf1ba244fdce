"""The embedding kernel compiles for every target and width, and reads dY in pieces of 16 bytes."""

import pytest

pytest.importorskip("triton")

import triton.language as tl
from aot import TARGETS, check, compile_for

from chunkft.kernels.gpu.embedding_grad import COLUMNS_MAX, TOKENS, embedding_grad_kernel

KINDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def compiled(kind, sm, columns=COLUMNS_MAX, by_frequency=False):
    types = {"dy": f"*{kind}", "order": "*i64", "bounds": "*i64", "out": f"*{kind}"}
    types |= {"width": "i32", "stride": "i32", "padding": "i32"}
    constexprs = {
        "BY_FREQUENCY": by_frequency,
        "DTYPE": KINDS[kind],
        "TOKENS": TOKENS,
        "COLUMNS": columns,
        "INTERPRETED": False,
    }
    return compile_for(embedding_grad_kernel, types, constexprs, sm, unaligned=["padding"])


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_widest_rows_compile_for_every_target(kind, sm):
    report = compiled(kind, sm)
    check(report)
    assert report.has("ld.global.v4.b32")


@pytest.mark.parametrize("columns", [1 << power for power in range(10)])
def test_every_width_compiles(columns):
    check(compiled("bf16", 90, columns))
    check(compiled("fp32", 80, columns, by_frequency=True))
