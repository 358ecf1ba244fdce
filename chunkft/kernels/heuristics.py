"""Chooses the tile of the weight-gradient kernels: legal configurations, a model of their time, the minimum.

Pure Python, no GPU needed. Each constraint is one predicate; the picker enumerates what satisfies all of them, and an
override by the caller is held against the same predicates. No figure of the model has been measured on a GPU yet:
``choice`` is cautious for that reason. A table of measurements, where there is one, comes before the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from chunkft.kernels.targets import Target

# register file of a multiprocessor holds 64 K words; half of a thread's 255 may be accumulator
_ACCUMULATOR_WORDS = 128
_WORKSPACE_BYTES = 64 << 20
# tokens that a program should at least sum before its part is worth the trip through the workspace
_SPLIT_BLOCKS = 4
# row tiles that are ordered together, see tile_of in gpu/wgrad.py
ROW_GROUP = 8
# bytes of a persistent tile's part on its way to memory, beside the buffers of the pipeline
_PART_BYTES = 32 << 10
# Bytes a microsecond that L2 feeds one multiprocessor with: 7 TB/s by 132, the upper end of what others measured on
# H100 (5.5 to 7: chipsandcheese.com/p/nvidias-h100-funny-l2-and-tons-of-bandwidth). 64 bytes a clock would be double.
_L2_SPEED = 53e3


@dataclass(frozen=True)
class Problem:
    """One weight gradient: ``rows`` x ``cols`` summed over ``tokens``, and what limits how it can be read.

    ``row_block`` and ``col_block``: 0 for a contiguous slice, else the size of the blocks that are named by index (1
    for arbitrary indices). ``row_shift`` and ``col_shift``: how far the start is from a multiple of 8. ``parts``: rows
    of each slice where several make up ``rows``; no tile has rows of two. ``described``: both matrices suit a tensor
    descriptor (16-byte aligned base and row pitch, not empty). ``shared``: several slices have one X.
    """

    tokens: int
    rows: int
    cols: int
    itemsize: int = 2
    out_itemsize: int = 2
    row_block: int = 0
    col_block: int = 0
    row_shift: int = 0
    col_shift: int = 0
    described: bool = True
    accumulate: bool = False
    tf32: bool = False
    parts: tuple[int, ...] = ()
    shared: bool = False

    @property
    def ieee(self) -> bool:
        """Whether products are fp32, which no tensor core computes."""
        return self.itemsize == 4 and not self.tf32


@dataclass(frozen=True)
class Config:
    """A launch: tile of the result, tokens a step, token ranges, warps, pipeline stages, and how tiles are read.

    ``persistent``: at most one program a multiprocessor, which walks over tiles (gpu/wgrad_persistent.py).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    tma: bool = False
    persistent: bool = False


@dataclass(frozen=True)
class Prediction:
    """Modelled time in microseconds and the largest of its parts."""

    microseconds: float
    bound: str


# What the picker may choose from, before splits; tests/kernels/test_aot_wgrad.py compiles all of it.
TILES_16BIT = (
    Config(128, 256, 64, 8, 4, persistent=True),
    Config(256, 128, 64, 8, 4, persistent=True),
    Config(128, 128, 64, 8, 4, persistent=True),
    Config(128, 128, 64, 8, 3, persistent=True),
    # Of 128 x 128 with three stages two blocks fit a multiprocessor, which is worth more than a fourth stage; 256 x 128
    # spills where it is not stored in parts.
    Config(128, 256, 64, 8, 4),
    Config(128, 256, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 64, 4, 3),
    Config(128, 64, 64, 4, 3),
    Config(32, 128, 64, 4, 3),
    Config(64, 64, 32, 8, 3),
)
TILES_TF32 = (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3))
TILES_IEEE = (Config(64, 64, 16, 4, 3),)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def is_power_of_two(config: Config, problem: Problem, target: Target) -> bool:
    """Triton's tiles are powers of two, and a dot needs at least 16 each way."""
    sides = (config.block_m, config.block_n, config.block_k)
    return all(side >= 16 and side & (side - 1) == 0 for side in sides)


def has_warps(config: Config, problem: Problem, target: Target) -> bool:
    """1 to 16 warps, a power of two, and 1 to 8 stages."""
    return config.num_warps in (1, 2, 4, 8, 16) and 1 <= config.num_stages <= 8


def fits_shared_memory(config: Config, problem: Problem, target: Target) -> bool:
    """The pipeline's buffers, and the tile on its way to memory, fit into what one block may have."""
    return shared_bytes(config, problem, target) <= target.shared_memory


def fits_registers(config: Config, problem: Problem, target: Target) -> bool:
    """The accumulator takes at most half of the registers of a thread."""
    return config.block_m * config.block_n <= _ACCUMULATOR_WORDS * 32 * config.num_warps


def fits_registers_of_fma(config: Config, problem: Problem, target: Target) -> bool:
    """fp32 products run on FMA units, which keep whole operand rows in registers beside the accumulator."""
    return not problem.ieee or (
        config.block_m * config.block_n <= 32 * 32 * config.num_warps and config.block_k <= 32
    )


def pointers_leave_registers(config: Config, problem: Problem, target: Target) -> bool:
    """Addresses take registers too: without TMA the largest tile spills on 9.0 and 10.0, in gathers most do."""
    if config.tma:
        return True
    area = config.block_m * config.block_n
    if problem.row_block or problem.col_block:
        return area <= 64 * 128
    return area < 128 * 256 or target.capability not in (90, 100)


def gathers_fit(config: Config, problem: Problem, target: Target) -> bool:
    """Elements read one by one wait in registers, at most 32 a thread, and two gathers need two sets of addresses.

    The small tile serves nothing else.
    """
    single = 1 in (problem.row_block, problem.col_block) or (problem.row_block and problem.col_block)
    small = (config.block_m + config.block_n) * config.block_k <= 32 * 32 * config.num_warps
    return small if single else not small or problem.itemsize == 4


def has_descriptors(config: Config, problem: Problem, target: Target) -> bool:
    """TMA needs compute capability 9.0, aligned matrices, and a tile that is one box of at most 256 a side."""
    if not config.tma:
        return True
    boxes = max(config.block_m, config.block_n, config.block_k) <= 256
    one_box = problem.row_block == 0 or problem.row_block % config.block_m == 0
    return target.capability >= 90 and problem.described and boxes and one_box and problem.col_block == 0


def can_persist(config: Config, problem: Problem, target: Target) -> bool:
    """The persistent kernel reads contiguous slices by TMA, a tile is one program's; the one of groups always can."""
    if not config.persistent or problem.parts:
        return True
    return config.tma and config.splits == 1 and not problem.row_block and not problem.col_block


def uses_descriptors(config: Config, problem: Problem, target: Target) -> bool:
    """Tensor cores are fed by TMA where it can be used; only an override reads through pointers there."""
    if problem.ieee:
        return not config.tma
    return config.tma or not has_descriptors(replace(config, tma=True), problem, target)


def fills_tensor_core(config: Config, problem: Problem, target: Target) -> bool:
    """The tensor cores of 9.0 (wgmma) and 10.0 (tcgen05) multiply 64 rows or more at a time."""
    return target.capability not in (90, 100) or problem.ieee or config.block_m >= 64


def has_depth(config: Config, problem: Problem, target: Target) -> bool:
    """Four stages are for TMA, and there they are taken where they fit."""
    if config.num_stages > 3:
        return config.tma
    deeper = replace(config, num_stages=4)
    known = replace(deeper, splits=1, tma=False) in TILES_16BIT
    return not (config.tma and known and fits_shared_memory(deeper, problem, target))


def persistence_has_work(config: Config, problem: Problem, target: Target) -> bool:
    """Walking over tiles pays where some program has more than one; in groups nothing says so yet."""
    return not config.persistent or (not problem.parts and tiles(config, problem) > target.multiprocessors)


def splits_have_work(config: Config, problem: Problem, target: Target) -> bool:
    """Every token range has a few steps, and none is empty."""
    if config.splits == 1:
        return True
    steps = -(-problem.tokens // config.block_k)
    each = -(-steps // config.splits)
    return config.splits > 1 and each >= _SPLIT_BLOCKS and each * (config.splits - 1) < steps


def splits_are_needed(config: Config, problem: Problem, target: Target) -> bool:
    """Splitting serves idle multiprocessors: none without it, and at most two waves with it."""
    if config.splits == 1:
        return True
    count = tiles(config, problem)
    return count < target.multiprocessors and count * config.splits <= 2 * target.multiprocessors


def fits_workspace(config: Config, problem: Problem, target: Target) -> bool:
    """The partial sums take at most 64 MiB."""
    return config.splits == 1 or workspace_elements(config, problem) * 4 <= _WORKSPACE_BYTES


Predicate = Callable[[Config, Problem, Target], bool]
# without these a launch fails or is wrong; an override must satisfy them
LIMITS: tuple[Predicate, ...] = (is_power_of_two, has_warps, fits_shared_memory, has_descriptors, can_persist)
# with these it is slow at worst
PREFERENCES: tuple[Predicate, ...] = (
    fits_registers,
    fits_registers_of_fma,
    pointers_leave_registers,
    gathers_fit,
    uses_descriptors,
    fills_tensor_core,
    has_depth,
    persistence_has_work,
    splits_have_work,
    splits_are_needed,
    fits_workspace,
)


def shared_bytes(config: Config, problem: Problem, target: Target) -> int:
    """Upper bound of the shared memory of a block; Triton needs one buffer less where it multiplies by mma.sync."""
    # tcgen05 takes tf32 operands in one order only, for which both are copied once more
    buffers = config.num_stages + (2 if problem.tf32 and target.capability == 100 else 0)
    buffers *= (config.block_m + config.block_n) * config.block_k * problem.itemsize
    if config.persistent and not problem.parts:
        # multiplied by mma.sync there is one buffer less; a part on its way lies beside the next tile's first operands
        buffers -= buffers // config.num_stages if target.capability == 120 else 0
        return buffers + part_bytes(config, problem) + 1024
    # barriers of the pipeline, and the tile's change of layout on the way to memory, which reuses the buffers
    return max(buffers + 1024, config.block_m * config.block_n * problem.out_itemsize + 1024)


def parts(config: Config, problem: Problem) -> int:
    """Column ranges in which a persistent program stores a tile."""
    count, size = 1, _stored_bytes(config, problem)
    while size // count > _PART_BYTES and config.block_n // count > 16:
        count *= 2
    return count


def part_bytes(config: Config, problem: Problem) -> int:
    """Shared memory for one part of a persistent tile: what is stored and, with ``accumulate``, what was there."""
    return _stored_bytes(config, problem) // parts(config, problem)


def _stored_bytes(config: Config, problem: Problem) -> int:
    return config.block_m * config.block_n * problem.out_itemsize * (2 if problem.accumulate else 1)


def tiles(config: Config, problem: Problem) -> int:
    """Tiles of the result; a start that is no multiple of 8 adds rows or columns that are not stored."""
    m, n = _tiles(config, problem)
    return m * n


def workspace_elements(config: Config, problem: Problem) -> int:
    """fp32 elements of the partial sums of all splits."""
    return tiles(config, problem) * config.splits * config.block_m * config.block_n


def broken_limits(config: Config, problem: Problem, target: Target) -> list[str]:
    """Names of the limits that a configuration does not satisfy."""
    return [limit.__name__ for limit in LIMITS if not limit(config, problem, target)]


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Every configuration that satisfies all constraints."""
    shapes = TILES_16BIT if problem.itemsize <= 2 else TILES_IEEE if problem.ieee else TILES_TF32
    for base in shapes:
        for tma in (True, False):
            for splits in SPLITS:
                config = replace(base, splits=splits, tma=tma)
                if all(test(config, problem, target) for test in (*LIMITS, *PREFERENCES)):
                    yield config


@lru_cache(maxsize=4096)
def pick(problem: Problem, target: Target, split: bool = True) -> Config:
    """The configuration of the least predicted time; ties go to the first, which has the larger tile."""
    legal = (c for c in candidates(problem, target) if split or c.splits == 1)
    return min(legal, key=lambda c: predict(c, problem, target).microseconds)


def predict(config: Config, problem: Problem, target: Target) -> Prediction:
    """Time of the Triton kernel: the slowest of arithmetic, memory and L2, plus what does not overlap.

    Assumptions, none measured: a 128 x 256 tile reaches 80 % of peak, less in proportion to the fourth root of a
    smaller area; memory 85 % of its speed; 4 us of launch, first loads and last stores, and 1 us more for every further
    tile of a multiprocessor that holds one block at a time, unless that is persistent and loads ahead. L2's speed was
    measured by others.
    """
    m, n = _tiles(config, problem)
    steps = math.ceil(math.ceil(problem.tokens / config.block_k) / config.splits)
    programs = m * n * config.splits
    rounds = -(-programs // target.multiprocessors)
    efficiency = 0.8 * min(1.0, config.block_m * config.block_n / (128 * 256)) ** 0.25
    speed = target.tflops(problem.itemsize, problem.tf32) * 1e6 / target.multiprocessors * efficiency
    work = 2.0 * config.block_m * config.block_n * config.block_k * steps
    narrow = 4 if 0 < problem.row_block < 8 or 0 < problem.col_block < 8 else 1
    arithmetic = rounds * work / speed * (2 if narrow > 1 else 1)
    read_x, read_dy = _passes(config, problem, target)
    traffic = (
        problem.tokens * (problem.cols * read_x + problem.rows * read_dy) * problem.itemsize * narrow**0.5
    )
    memory = (traffic + _output_bytes(problem)) / (0.85e3 * target.bandwidth)
    tile_bytes = (config.block_m + config.block_n) * config.block_k * problem.itemsize * narrow
    l2 = rounds * steps * tile_bytes / _L2_SPEED
    times = {"arithmetic": arithmetic, "memory": memory, "l2": l2}
    bound = max(times, key=times.__getitem__)
    partial = config.block_m * config.block_n * 4
    meeting = 0.0 if config.splits == 1 else 1.0 + (rounds + config.splits) * partial / _L2_SPEED
    alone = 2 * shared_bytes(config, problem, target) > target.shared_memory
    between = float(rounds - 1) if alone and not config.persistent else 0.0
    return Prediction(times[bound] + meeting + between + 4.0, bound)


def predict_torch(problem: Problem, target: Target) -> Prediction:
    """Time of PyTorch for the same result: an optimistic product, and the copies that a gather needs.

    The product is taken at the better of 85 % of peak in whole waves of the best tile, and 90 % of memory speed.
    """
    speed = target.tflops(problem.itemsize, problem.tf32) * 0.85e6
    best = float("inf")
    for m, n in ((256, 128), (128, 256), (128, 128), (64, 128), (64, 64)):
        count = -(-problem.rows // m) * -(-problem.cols // n)
        # few tiles: split-K, as if it were free
        waves = count / target.multiprocessors
        waves = math.ceil(waves) if waves > 1 else waves
        best = min(best, waves * 2.0 * m * n * problem.tokens / (speed / target.multiprocessors))
    read = problem.tokens * (problem.rows + problem.cols) * problem.itemsize + _output_bytes(problem)
    memory = read / (0.9e3 * target.bandwidth)
    copies = 0.0
    for block, size in ((problem.row_block, problem.rows), (problem.col_block, problem.cols)):
        if block:
            copies += 2.0 + 2.0 * problem.tokens * size * problem.itemsize / (0.85e3 * target.bandwidth)
    times = {"arithmetic": best, "memory": memory}
    bound = max(times, key=times.__getitem__)
    return Prediction(times[bound] + copies + 4.0, bound)


def roofline(problem: Problem, target: Target) -> Prediction:
    """Least time that the arithmetic peak and the memory speed of the data sheet allow."""
    arithmetic = 2.0 * problem.tokens * problem.rows * problem.cols
    arithmetic /= target.tflops(problem.itemsize, problem.tf32) * 1e6
    read = problem.tokens * (problem.rows + problem.cols) * problem.itemsize + _output_bytes(problem)
    memory = read / (target.bandwidth * 1e3)
    return Prediction(max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory")


def _tiles(config: Config, problem: Problem) -> tuple[int, int]:
    rows, cols = problem.rows + problem.row_shift, problem.cols + problem.col_shift
    spans = problem.parts or (rows,)
    return sum(-(-span // config.block_m) for span in spans), -(-cols // config.block_n)


def _passes(config: Config, problem: Problem, target: Target) -> tuple[int, int]:
    """How often X and dY come from memory: once a group of row tiles, once a wave, or once if L2 holds them."""
    m, n = _tiles(config, problem)
    x_bytes = problem.tokens * problem.cols * problem.itemsize
    group_bytes = problem.tokens * min(m, ROW_GROUP) * config.block_m * problem.itemsize
    read_x = 1 if x_bytes <= target.l2 // 2 else -(-m // ROW_GROUP)
    waves = -(-min(m, ROW_GROUP) * n // target.multiprocessors)
    return read_x, 1 if group_bytes <= target.l2 // 2 else max(1, waves)


def _output_bytes(problem: Problem) -> int:
    return problem.rows * problem.cols * problem.out_itemsize * (2 if problem.accumulate else 1)
