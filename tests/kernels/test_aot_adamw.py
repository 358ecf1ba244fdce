"""The AdamW kernel compiles for every target without spills, and moves memory in 16-byte pieces."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from aot import NEWEST, TARGETS, check, compile_for
from triton.runtime import jit

from chunkft.kernels import gpu
from chunkft.kernels.adamw import adamw
from chunkft.kernels.adamw_table import SLOTS_MAX, SLOTS_MIN
from chunkft.kernels.gpu.adamw import VARIANTS, adamw_kernel

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


def compiled(kind, sm, guarded=True, slots=SLOTS_MIN, moment=tl.float32, tile=VARIANTS[0], second=None):
    parameter, gradient, master = KINDS[kind]
    constexprs = {
        "KIND": parameter,
        "GRAD_KIND": gradient,
        "FIRST_KIND": moment,
        "SECOND_KIND": moment if second is None else second,
        "MASTER": master,
        "WATCHED": guarded,
        "SCALED": guarded,
        "CLIPPED": guarded,
        "SLOTS": slots,
        "SIZE": tile.block,
        "REPEAT": tile.loops,
        "INTERPRETED": False,
    }
    return compile_for(adamw_kernel, TYPES, constexprs, sm, num_warps=tile.warps)


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


@pytest.mark.parametrize(
    ("kind", "sm"), [*(("bf16-residual", sm) for sm in TARGETS), ("fp32", 90), ("bf16-fp32", 120)]
)
def test_moments_of_8_bits_compile_without_spills(kind, sm):
    report = compiled(kind, sm, moment=tl.int8, second=tl.uint8)
    check(report)
    code = report.sass()
    # eight codes of a moment at a time, of both
    assert code.count("LDG.E.64") >= 2
    assert code.count("STG.E.64") >= 2
    # 16-bit weights are held by the same threads as the codes, which exchange the eight scales of a tile and no element
    assert report.shared <= (8 * 4 if KINDS[kind][0] == tl.bfloat16 and kind != "bf16-fp32" else 1024 * 4)
    # 4 blocks of 128 threads a multiprocessor
    assert report.registers <= (112 if NEWEST else 137)


def test_plain_and_crowded_launches_compile_too():
    check(compiled("fp32", 90, guarded=False))
    check(compiled("bf16-residual", 90, slots=SLOTS_MAX))
    check(compiled("bf16-none", 90, moment=tl.bfloat16))


@pytest.mark.parametrize("tile", VARIANTS, ids=str)
def test_what_a_sweep_may_try_compiles(tile):
    report = compiled("bf16-residual", 90, tile=tile)
    check(report)
    # parameter, residual and gradient of 16 bits: whole 16-byte pieces take eight elements a thread
    wide = report.sass().count("LDG.E.128")
    assert wide == (7 if tile.block == 256 * tile.warps else 2)


@pytest.fixture
def launched(monkeypatch):
    """Launches as they would be made, with whatever was current: CPU tensors stand in for those of a GPU."""
    seen, current = [], []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((tuple(current), arguments, options))

    @contextlib.contextmanager
    def enter(tensor):
        current.append(tensor)
        yield
        current.remove(tensor)

    monkeypatch.setattr(gpu, "runs_on", lambda tensor: True)
    monkeypatch.setattr(gpu, "current", enter)
    monkeypatch.setattr("chunkft.kernels.gpu.adamw.adamw_kernel", Recorder())
    return seen


def update(dtype=torch.bfloat16):
    tensors = [torch.ones(7, dtype=dtype), torch.ones(7, dtype=dtype), torch.zeros(7), torch.zeros(7)]
    adamw(*([t] for t in tensors), [torch.zeros(())], lr=0.1, backend="triton")


def test_launches_are_on_the_device_of_their_tensors(launched):
    update()
    ((current, _, _),) = launched
    assert [tensor.dtype for tensor in current] == [torch.bfloat16]


def test_hooks_of_the_compiler_can_write_down_a_launch(launched):
    """What ``triton.knobs.runtime.jit_cache_hook`` receives is made by this function of Triton's."""
    update()
    ((_, _, options),) = launched
    constants = {
        (adamw_kernel.arg_names.index(k),): v for k, v in options.items() if k in adamw_kernel.arg_names
    }
    assert len(constants) >= 10
    anything = type("Anything", (), {})()
    more = [anything] * (jit.serialize_specialization_data.__code__.co_argcount - 6)
    text = jit.serialize_specialization_data("kernel", {}, constants, {}, anything, "key", *more)
    assert "bf16" in text


def test_a_tensor_of_another_device_makes_that_current(monkeypatch):
    entered = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext()
    )
    elsewhere = type("Elsewhere", (), {"is_cuda": True, "device": torch.device("cuda", 1)})()
    with gpu.current(elsewhere):
        assert entered == [torch.device("cuda", 1)]
    with gpu.current(torch.zeros(1)):
        assert len(entered) == 1
