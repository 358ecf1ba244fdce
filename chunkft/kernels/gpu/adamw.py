"""AdamW of every slice of a chunk in one launch: read each tensor once, write it once, nothing in between."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkft.kernels import adamw_table, gpu
from chunkft.kernels.adamw import checked_pieces
from chunkft.kernels.adamw_table import TABLES, Columns, Scalars, Tile, batches_of
from chunkft.kernels.gpu.common import rounded
from chunkft.kernels.gpu.companding import (
    BLOCK,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from chunkft.kernels.gpu.philox import noise16

# What may be swept on a GPU; the first is taken. The blocks of a program share the search for their slice, once in 4096
# elements. On 9.0 a thread of the first has all loads of a block under way at once, seven of 16 bytes with a residual,
# in 80 registers (128 with Triton 3.6); with 8 warps loads of 16-bit tensors are of 8 bytes.
VARIANTS = (
    Tile(1024, 4, 4),
    Tile(1024, 8, 4),
    Tile(1024, 16, 4),
    Tile(512, 8, 2),
    Tile(2048, 4, 8),
    Tile(1024, 4, 8),
)

HEADER = tl.constexpr(adamw_table.HEADER)
FIELDS = tl.constexpr(adamw_table.FIELDS)
FIELDS_EIGHT = tl.constexpr(adamw_table.FIELDS_EIGHT)
PARAM = tl.constexpr(adamw_table.PARAM)
GRAD = tl.constexpr(adamw_table.GRAD)
EXP_AVG = tl.constexpr(adamw_table.EXP_AVG)
EXP_AVG_SQ = tl.constexpr(adamw_table.EXP_AVG_SQ)
EXTRA = tl.constexpr(adamw_table.EXTRA)
COUNTER = tl.constexpr(adamw_table.COUNTER)
STEP = tl.constexpr(adamw_table.STEP)
NUMEL = tl.constexpr(adamw_table.NUMEL)
COLUMNS = tl.constexpr(adamw_table.COLUMNS)
STRIDE = tl.constexpr(adamw_table.STRIDE)
WIDE = tl.constexpr(adamw_table.WIDE)
SEED = tl.constexpr(adamw_table.SEED)
LR = tl.constexpr(adamw_table.LR)
DECAY = tl.constexpr(adamw_table.DECAY)
FIRST_SCALE = tl.constexpr(adamw_table.FIRST_SCALE)
SECOND_SCALE = tl.constexpr(adamw_table.SECOND_SCALE)

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


@triton.jit
def _float64(place):
    return tl.load(place).to(tl.float64, bitcast=True)


@triton.jit
def _read(pointer, mask):
    return tl.load(pointer, mask=mask).to(tl.float32)


@triton.jit
def _fma(a, b, c, INTERPRETED: tl.constexpr):
    """``a b + c`` in fp32, rounded once; the interpreter would round twice."""
    a = tl.zeros_like(b) + a
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _is_special(bits):
    return (bits & 0x7F800000) == 0x7F800000


@triton.jit
def _quiet(bits):
    """Bits of fp32 that can be truncated to 16 without turning a NaN into an infinity."""
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, bits)


@triton.jit
def _join(weight, residual):
    """``rounding.apply_residual``; a zero that was set by others has no residual below it."""
    high = weight.to(tl.int32) << 16
    low = residual.to(tl.int32)
    low = tl.where(((high & 0x7FFFFFFF) == 0) & (low < 0), 0, low)
    special = _is_special(high)
    overflowed = special & (low < 0) & ((high & 0x007F0000) == 0)
    joined = tl.where(special & (overflowed == 0), high | (low & 0xFFFF), high + low)
    return joined.to(tl.float32, bitcast=True)


@triton.jit
def _split(value):
    """``rounding.split_residual``: bf16 as int16, and what is missing as int16."""
    bits = value.to(tl.int32, bitcast=True)
    high = tl.where(_is_special(bits), _quiet(bits), bits + 0x8000) >> 16
    return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)


@triton.jit
def _stochastic(value, noise):
    """``rounding.stochastic_round``: bf16 as int16."""
    bits = value.to(tl.int32, bitcast=True)
    return (tl.where(_is_special(bits), _quiet(bits), bits + noise) >> 16).to(tl.int16)


@triton.jit
def _update_block(
    row,
    begin,
    numel,
    scale,
    factor,
    pull,
    beta2,
    keep2,
    eps,
    step_size,
    root,
    decay,
    KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    MASTER: tl.constexpr,
    SCALED: tl.constexpr,
    CLIPPED: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    bits16: tl.constexpr = MASTER == "residual" or MASTER == "stochastic"
    eight: tl.constexpr = tl.int8 == FIRST_KIND
    param = tl.load(row + PARAM).to(tl.pointer_type(tl.int16 if bits16 else KIND))
    grad = tl.load(row + GRAD).to(tl.pointer_type(GRAD_KIND))
    exp_avg = tl.load(row + EXP_AVG).to(tl.pointer_type(FIRST_KIND))
    exp_avg_sq = tl.load(row + EXP_AVG_SQ).to(tl.pointer_type(SECOND_KIND))
    extra = tl.load(row + EXTRA).to(tl.pointer_type(tl.int16 if MASTER == "residual" else tl.float32))
    lane = tl.arange(0, SIZE)  # [SIZE]
    at = begin + lane
    if WHOLE:
        inside = None
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        extra = tl.multiple_of(extra, 16)
        param += at
    else:
        inside = at < numel
        columns = tl.load(row + COLUMNS)
        above = begin // columns
        position = (begin - above * columns).to(tl.int32) + lane
        down = position // columns.to(tl.int32)
        param += (above + down) * tl.load(row + STRIDE) + (position - down * columns.to(tl.int32))
    g = _read(grad + at, inside)
    if SCALED:
        g = g * scale
    if CLIPPED:
        g = g * factor
    weight = tl.load(param, mask=inside)
    if MASTER == "residual":
        value = _join(weight, tl.load(extra + at, mask=inside))
    elif MASTER == "stochastic":
        value = (weight.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = weight.to(tl.float32)
    if MASTER == "fp32":
        master = tl.load(extra + at, mask=inside)
        # a weight that was changed by others wins over its master
        value = tl.where(rounded(master, KIND, INTERPRETED).to(tl.float32) == value, master, value)
    if eight:
        block = begin // BLOCK + tl.arange(0, SIZE // BLOCK)  # [SIZE / BLOCK]
        first_scale = tl.load(row + FIRST_SCALE).to(tl.pointer_type(tl.float32)) + block
        second_scale = tl.load(row + SECOND_SCALE).to(tl.pointer_type(tl.float32)) + block
        begun = None if WHOLE else block * BLOCK < numel
        m = decode_first(tl.load(exp_avg + at, mask=inside), tl.load(first_scale, mask=begun), SIZE)
        v = decode_second(tl.load(exp_avg_sq + at, mask=inside), tl.load(second_scale, mask=begun), SIZE)
    else:
        m = _read(exp_avg + at, inside)
        v = _read(exp_avg_sq + at, inside)
    value = value * decay
    # as PyTorch's lerp and addcmul do it on a CPU, so that the bits are the same
    m = _fma(pull, g - m, tl.where(pull > 0, m, g), INTERPRETED)
    v = _fma(keep2 * g, g, v * beta2, INTERPRETED)
    second_root = tl.sqrt_rn(v)
    denominator = tl.math.div_rn(second_root, tl.zeros_like(v) + root) + eps
    value = value + tl.math.div_rn(-step_size * m, denominator)
    if eight:
        first_code, first_new = encode_first(m, inside, SIZE)
        second_code, second_new = encode_second(v, second_root, inside, SIZE)
        tl.store(exp_avg + at, first_code, mask=inside)
        tl.store(exp_avg_sq + at, second_code, mask=inside)
        tl.store(first_scale, first_new, mask=begun)
        tl.store(second_scale, second_new, mask=begun)
    else:
        tl.store(exp_avg + at, rounded(m, FIRST_KIND, INTERPRETED), mask=inside)
        tl.store(exp_avg_sq + at, rounded(v, SECOND_KIND, INTERPRETED), mask=inside)
    if MASTER == "residual":
        upper, lower = _split(value)
        tl.store(param, upper, mask=inside)
        tl.store(extra + at, lower, mask=inside)
    elif MASTER == "stochastic":
        tl.store(param, _stochastic(value, noise16(tl.load(row + SEED), begin, SIZE)), mask=inside)
    else:
        tl.store(param, rounded(value, KIND, INTERPRETED), mask=inside)
    if MASTER == "fp32":
        tl.store(extra + at, value, mask=inside)


@triton.jit
def adamw_kernel(
    table,
    starts,
    found_inf,
    grad_scale,
    clip_factor,
    pull,
    beta2,
    keep2,
    eps,
    KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    MASTER: tl.constexpr,
    WATCHED: tl.constexpr,
    SCALED: tl.constexpr,
    CLIPPED: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    REPEAT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One slice after the other, each in blocks; a program finds its slice in ``starts``.

    ``m' = m + (1 - b1)(g - m)``, ``v' = b2 v + (1 - b2) g^2``,
    ``p' = p (1 - lr wd) - lr / (1 - b1^t) m' / (sqrt(v') / sqrt(1 - b2^t) + eps)`` (arXiv 1711.05101, algorithm 2).

    ``table``: of ``adamw_table``; ``starts``: (SLOTS,) int64, first program of every slice, padded with
    ``adamw_table.LAST``; ``pull``: of ``_pull``. With FIRST_KIND int8 and SECOND_KIND uint8 moments are codes,
    whole blocks a program (``companding``). Corrections are computed in fp64, once a program; all else in fp32.
    """
    if WATCHED:  # noqa: SIM102 - a constexpr decides whether there is anything to load
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    slots = tl.load(starts + tl.arange(0, SLOTS))  # [SLOTS]
    index = tl.sum((slots <= program).to(tl.int32)) - 1
    row = table + HEADER + index * (FIELDS_EIGHT if tl.int8 == FIRST_KIND else FIELDS)
    counter = tl.load(row + COUNTER)
    step = _float64(row + STEP)
    if counter != 0:
        step = tl.load(counter.to(tl.pointer_type(tl.float32))).to(tl.float64)
    correction1 = 1 - tl.exp(step * _float64(table))
    correction2 = 1 - tl.exp(step * _float64(table + 1))
    step_size = (_float64(row + LR) / correction1).to(tl.float32)
    root = tl.sqrt(correction2).to(tl.float32)
    decay = _float64(row + DECAY).to(tl.float32)
    scale = 1.0
    factor = 1.0
    if SCALED:
        scale = tl.math.div_rn(1.0, tl.load(grad_scale))
    if CLIPPED:
        factor = tl.load(clip_factor)
    numel = tl.load(row + NUMEL)
    wide = tl.load(row + WIDE) != 0
    first = (program - tl.load(starts + index)).to(tl.int64) * (SIZE * REPEAT)
    for part in range(REPEAT):
        begin = first + part * SIZE
        if begin < numel:
            if wide & (begin + SIZE <= numel):
                _update_block(row, begin, numel, scale, factor, pull, beta2, keep2, eps, step_size, root, decay,
                              KIND, GRAD_KIND, FIRST_KIND, SECOND_KIND, MASTER, SCALED, CLIPPED, True, SIZE,
                              INTERPRETED)  # fmt: skip
            else:
                # an element a thread: the addresses of more would take the registers of the common case
                for _ in range(4):
                    _update_block(row, begin, numel, scale, factor, pull, beta2, keep2, eps, step_size, root, decay,
                                  KIND, GRAD_KIND, FIRST_KIND, SECOND_KIND, MASTER, SCALED, CLIPPED, False, SIZE // 4,
                                  INTERPRETED)  # fmt: skip
                    begin += SIZE // 4


def prepare(
    columns: Columns,
    grads: Sequence[Tensor],
    scalars: Scalars,
    betas: tuple[float, float],
    eps: float,
    master: str,
    grad_scale: Tensor | None,
    clip_factor: Tensor | None,
    found_inf: Tensor | None,
    tile: Tile | None = None,
) -> list[Callable[[], object]]:
    """Launches, one for each combination of dtypes among the slices and each SLOTS_MAX slices, ready to be called.

    The slices are checked, and their rows of the table computed, unless a call of late had the same tensors. ``tile``:
    the first of VARIANTS by default.

    Raises:
        ValueError: if tensors do not fit together, or a parameter is not one that the kernel can update.
    """
    tile = VARIANTS[0] if tile is None else tile
    name = (len(grads), columns[0][0].data_ptr(), master, tile)
    batches = TABLES.find(name, columns, grads)
    if batches is None:
        batches = batches_of(checked_pieces(columns, grads, scalars, master), tile)
        TABLES.keep(name, columns, grads, batches)
    launches: list[Callable[[], object]] = []
    for batch in batches:
        host, members = batch.fill(grads, scalars, betas)
        device = members[0].device
        # From page-locked memory the copy is queued without a wait; PyTorch keeps that memory until it is done.
        table = host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
        kind, grad_kind, first_kind, second_kind = (_TYPES[dtype] for dtype in batch.dtypes)
        launches.append(
            functools.partial(
                _launch,
                members,
                batch.programs,
                tile,
                table[batch.slots :],
                table[: batch.slots],
                table if found_inf is None else found_inf,
                table if grad_scale is None else grad_scale,
                table if clip_factor is None else clip_factor,
                _pull(betas[0]),
                betas[1],
                1 - betas[1],
                eps,
                KIND=kind,
                GRAD_KIND=grad_kind,
                FIRST_KIND=first_kind,
                SECOND_KIND=second_kind,
                MASTER=master,
                WATCHED=found_inf is not None,
                SCALED=grad_scale is not None,
                CLIPPED=clip_factor is not None,
                SLOTS=batch.slots,
            )
        )
    return launches


def _launch(
    grads: Sequence[Tensor], programs: int, tile: Tile, *arguments: object, **constexprs: object
) -> None:
    """``grads`` are those that the table points to, which have to live until now."""
    with gpu.current(grads[0]):
        adamw_kernel[(programs,)](
            *arguments,
            **constexprs,
            SIZE=tile.block,
            REPEAT=tile.loops,
            INTERPRETED=gpu.interpreted(),
            # without fused multiply-adds a GPU gives the bits that the interpreter gives; memory is the bound
            enable_fp_fusion=False,
            num_warps=tile.warps,
        )


@functools.cache
def _pull(beta1: float) -> float:
    """What the difference of gradient and moment is multiplied with: below 1/2 from the moment, else from the gradient.

    In fp32, as PyTorch's ``lerp`` rounds it.
    """
    weight = torch.tensor(1 - beta1, dtype=torch.float32)
    return float(weight if weight < 0.5 else weight - 1)
