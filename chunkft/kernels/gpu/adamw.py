"""AdamW of every slice of a chunk in one launch: read each tensor once, write it once, nothing in between."""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkft.kernels import gpu
from chunkft.kernels.adamw import Piece
from chunkft.kernels.gpu.common import rounded
from chunkft.kernels.gpu.philox import noise16

BLOCK = 1024
LOOPS = 4  # blocks of one program, so that finding its slice is paid once in 4,096 elements
WARPS = 4
# a contiguous slice is rows of this many elements, so that the position in a row fits into 32 bits
CONTIGUOUS = 1 << 30
LAST = 2**31 - 1
# slots in the table of starts: a power of 4, so that few variants are compiled
SLOTS_MIN = 16
SLOTS_MAX = 1024

# The table, int64: log(beta1) and log(beta2), then FIELDS of every slice; floats are fp64 by their bits.
HEADER = tl.constexpr(2)
FIELDS = tl.constexpr(14)
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
EXTRA = tl.constexpr(4)  # master or residual
COUNTER = tl.constexpr(5)  # address of the step count, or 0: then STEP is the count
STEP = tl.constexpr(6)
NUMEL = tl.constexpr(7)
COLUMNS = tl.constexpr(8)  # of one row of the parameter
STRIDE = tl.constexpr(9)  # from row to row of the parameter, in elements
WIDE = tl.constexpr(10)  # every tensor starts at a multiple of 16 bytes, and the parameter is contiguous
SEED = tl.constexpr(11)
LR = tl.constexpr(12)
DECAY = tl.constexpr(13)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    DTYPES: tl.constexpr,
    MASTER: tl.constexpr,
    SCALED: tl.constexpr,
    CLIPPED: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    kind: tl.constexpr = DTYPES[0]
    bits16: tl.constexpr = MASTER == "residual" or MASTER == "stochastic"
    param = tl.load(row + PARAM).to(tl.pointer_type(tl.int16 if bits16 else kind))
    grad = tl.load(row + GRAD).to(tl.pointer_type(DTYPES[1]))
    exp_avg = tl.load(row + EXP_AVG).to(tl.pointer_type(DTYPES[2]))
    exp_avg_sq = tl.load(row + EXP_AVG_SQ).to(tl.pointer_type(DTYPES[3]))
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
        value = tl.where(rounded(master, kind, INTERPRETED).to(tl.float32) == value, master, value)
    m = _read(exp_avg + at, inside)
    v = _read(exp_avg_sq + at, inside)
    value = value * decay
    # as PyTorch's lerp and addcmul do it on a CPU, so that the bits are the same
    m = _fma(pull, g - m, tl.where(pull > 0, m, g), INTERPRETED)
    v = _fma(keep2 * g, g, v * beta2, INTERPRETED)
    denominator = tl.math.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps
    value = value + tl.math.div_rn(-step_size * m, denominator)
    tl.store(exp_avg + at, rounded(m, DTYPES[2], INTERPRETED), mask=inside)
    tl.store(exp_avg_sq + at, rounded(v, DTYPES[3], INTERPRETED), mask=inside)
    if MASTER == "residual":
        upper, lower = _split(value)
        tl.store(param, upper, mask=inside)
        tl.store(extra + at, lower, mask=inside)
    elif MASTER == "stochastic":
        tl.store(param, _stochastic(value, noise16(tl.load(row + SEED), begin, SIZE)), mask=inside)
    else:
        tl.store(param, rounded(value, kind, INTERPRETED), mask=inside)
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
    DTYPES: tl.constexpr,
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

    ``table``: as above; ``starts``: (SLOTS,) int64, first program of every slice, padded with LAST; ``pull``: of
    ``_pull``. Corrections are computed in fp64, once a program; all else in fp32.
    """
    if WATCHED:  # noqa: SIM102 - a constexpr decides whether there is anything to load
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    slots = tl.load(starts + tl.arange(0, SLOTS))  # [SLOTS]
    index = tl.sum((slots <= program).to(tl.int32)) - 1
    row = table + HEADER + index * FIELDS
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
                              DTYPES, MASTER, SCALED, CLIPPED, True, SIZE, INTERPRETED)  # fmt: skip
            else:
                # an element a thread: the addresses of more would take the registers of the common case
                for _ in range(4):
                    _update_block(row, begin, numel, scale, factor, pull, beta2, keep2, eps, step_size, root, decay,
                                  DTYPES, MASTER, SCALED, CLIPPED, False, SIZE // 4, INTERPRETED)  # fmt: skip
                    begin += SIZE // 4


def prepare(
    pieces: Sequence[Piece],
    betas: tuple[float, float],
    eps: float,
    master: str,
    grad_scale: Tensor | None,
    clip_factor: Tensor | None,
    found_inf: Tensor | None,
) -> list[Callable[[], object]]:
    """Launches, one for each combination of dtypes among the slices and each SLOTS_MAX slices, ready to be called."""
    groups: dict[tuple[torch.dtype, ...], list[Piece]] = {}
    for piece in pieces:
        if piece.param.numel():
            tensors = (piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq)
            kept = dataclasses.replace(piece, grad=piece.grad.contiguous())  # lives until the launch
            groups.setdefault(tuple(t.dtype for t in tensors), []).append(kept)
    launches: list[Callable[[], object]] = []
    for dtypes, members in groups.items():
        for begin in range(0, len(members), SLOTS_MAX):
            part = members[begin : begin + SLOTS_MAX]
            table, slots, programs = _table(part, betas)
            launches.append(
                functools.partial(
                    _launch,
                    part,
                    programs,
                    table[slots:],
                    table[:slots],
                    table if found_inf is None else found_inf,
                    table if grad_scale is None else grad_scale,
                    table if clip_factor is None else clip_factor,
                    _pull(betas[0]),
                    betas[1],
                    1 - betas[1],
                    eps,
                    DTYPES=tuple(_TYPES[dtype] for dtype in dtypes),
                    MASTER=master,
                    WATCHED=found_inf is not None,
                    SCALED=grad_scale is not None,
                    CLIPPED=clip_factor is not None,
                    SLOTS=slots,
                )
            )
    return launches


def _launch(pieces: Sequence[Piece], programs: int, *arguments: object, **constexprs: object) -> None:
    """``pieces`` are those that the table points to, which have to live until now."""
    adamw_kernel[(programs,)](
        *arguments,
        **constexprs,
        SIZE=BLOCK,
        REPEAT=LOOPS,
        INTERPRETED=gpu.interpreted(),
        # without fused multiply-adds a GPU gives the bits that the interpreter gives; memory is the bound
        enable_fp_fusion=False,
        num_warps=WARPS,
    )


def _pull(beta1: float) -> float:
    """What the difference of gradient and moment is multiplied with: below 1/2 from the moment, else from the gradient.

    In fp32, as PyTorch's ``lerp`` rounds it.
    """
    weight = torch.tensor(1 - beta1, dtype=torch.float32)
    return float(weight if weight < 0.5 else weight - 1)


def _table(pieces: Sequence[Piece], betas: tuple[float, float]) -> tuple[Tensor, int, int]:
    """Slots and table in one tensor on the device, the number of slots, and the number of programs."""
    starts: list[int] = []
    rows: list[list[int]] = []
    programs = 0
    for piece in pieces:
        rows.append(_row(piece))
        starts.append(programs)
        programs += -(-piece.param.numel() // (BLOCK * LOOPS))
    if programs >= LAST:
        raise ValueError(f"{programs} blocks are too many for one launch; update fewer slices at a time")
    slots = SLOTS_MIN
    while slots < len(pieces):
        slots *= 4
    header = [_bits(math.log(beta) if beta else -math.inf) for beta in betas]
    content = [*starts, *[LAST] * (slots - len(starts)), *header, *(value for row in rows for value in row)]
    host = torch.tensor(content, dtype=torch.int64)
    device = pieces[0].param.device
    if device.type == "cpu":
        return host, slots, programs
    # From page-locked memory the copy is queued without a wait; PyTorch keeps that memory until it is done.
    return host.pin_memory().to(device, non_blocking=True), slots, programs


def _row(piece: Piece) -> list[int]:
    tensors = [piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq]
    tensors += [] if piece.extra is None else [piece.extra]
    columns, stride = _rows(piece.param)
    wide = columns == CONTIGUOUS and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    on_host = not math.isnan(piece.step)
    return [
        piece.param.data_ptr(),
        piece.grad.data_ptr(),
        piece.exp_avg.data_ptr(),
        piece.exp_avg_sq.data_ptr(),
        0 if piece.extra is None else piece.extra.data_ptr(),
        0 if on_host else piece.counter.data_ptr(),
        _bits(piece.step),
        piece.param.numel(),
        columns,
        stride,
        int(wide),
        piece.seed,
        _bits(piece.lr),
        _bits(1 - piece.lr * piece.weight_decay),
    ]


def _rows(param: Tensor) -> tuple[int, int]:
    """Elements of a row and elements from row to row, for a parameter whose rows are contiguous."""
    if param.is_contiguous():
        return CONTIGUOUS, CONTIGUOUS
    columns = 1
    for size, stride in zip(reversed(param.shape), reversed(param.stride()), strict=True):
        if size != 1 and stride != columns:
            break
        columns *= size
    try:
        stride = param.view(-1, columns).stride(0)
    except RuntimeError:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} is not a matrix with contiguous "
            "rows; its update needs backend='torch'"
        ) from None
    if columns > CONTIGUOUS:
        raise ValueError(f"rows of {columns} elements are too long; allowed are 2^30")
    return columns, stride


def _bits(value: float) -> int:
    """The bits of an fp64 number as a signed integer."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
