"""Decides between PyTorch (cuBLAS on a GPU) and Triton for ``backend="auto"``: cuBLAS, until Triton has earned it.

1. What was measured on the family of the device decides, with a margin of 1.03 (``measured.Table.find``).
2. Without a measurement a model decides nothing where cuBLAS computes the same thing in one product: a contiguous
   slice, whatever its start, alone, stays with cuBLAS.
3. Without a measurement the model of ``heuristics`` may pick Triton only where PyTorch has more to do than one product,
   and only with a margin of 1.3 over the best that PyTorch offers:

   - gathers of ``Blocks`` of 8 or more: PyTorch copies first. Single indices, which Triton reads element by element,
     stay with PyTorch.
   - the squared norm: PyTorch reads the result once more.
   - several slices that share X, against one product of their concatenated dY if that is faster than one each.
   - many slices in one launch (ragged ones, experts): PyTorch needs a product each.

No figure of the model was measured on a GPU. Pure Python, no GPU needed.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from chunkft.kernels.heuristics import Config, Problem, pick, predict, predict_torch
from chunkft.kernels.measured import Table
from chunkft.kernels.targets import Target

# how much faster than PyTorch Triton must be to be taken: as measured, and as modelled where nothing was measured
MEASURED_MARGIN = 1.03
MODEL_MARGIN = 1.3
# Of several products in a row each but the first costs this much more than its work, in microseconds: the fixed part of
# ``predict_torch`` partly overlaps with the work of the neighbours.
NEXT_PRODUCT = 2.0
_ALONE = 4.0
# fewer slices than this, each with an X of its own, are a few products of cuBLAS
MANY = 4


def asks(tensor: Tensor) -> bool:
    """Whether ``backend="auto"`` has a choice for this tensor: on a CUDA device."""
    return tensor.is_cuda


def choose(
    problem: Problem, target: Target, table: Table | None = None, *, norm: bool = False
) -> Config | None:
    """The configuration to run for one slice if Triton is to be taken, else None; the module's docstring has the rules.

    Args:
        problem: one slice, no ``parts``.
        target: the device.
        table: measurements of its family.
        norm: whether the squared norm of the result is wanted as well.
    """
    decided, config = _measured(problem, target, table)
    if decided:
        return config
    gathered = [block for block in (problem.row_block, problem.col_block) if block]
    if not (gathered or norm) or min(gathered, default=8) < 8:
        return None
    theirs = predict_torch(problem, target).microseconds + (
        norm_microseconds(problem, target) if norm else 0.0
    )
    return _modelled(problem, target, theirs)


def choose_group(
    problem: Problem, target: Target, table: Table | None = None, *, split: bool = True
) -> Config | None:
    """The configuration to run for several slices in one launch if Triton is to be taken, else None.

    Args:
        problem: all slices; ``parts`` has the rows of each, ``shared`` tells whether they have one X.
        target: the device.
        table: measurements of its family; they are of slices that share X, and of experts.
        split: whether tokens may be split over programs; not so for experts, whose numbers of tokens the device knows.
    """
    if problem.shared or not split:
        decided, config = _measured(problem, target, table)
        if decided:
            return config if config is None or split or config.splits == 1 else None
    if len(problem.parts) < (2 if problem.shared else MANY):
        return None
    theirs = one_by_one(problem, target)
    if problem.shared:
        theirs = min(theirs, by_one_product(problem, target))
    return _modelled(problem, target, theirs, split)


def one_by_one(problem: Problem, target: Target) -> float:
    """Modelled microseconds of a product of PyTorch for each slice."""
    alone = [replace(problem, rows=part, parts=()) for part in problem.parts]
    work = sum(predict_torch(one, target).microseconds - _ALONE for one in alone)
    return work + _ALONE + NEXT_PRODUCT * (len(alone) - 1)


def by_one_product(problem: Problem, target: Target) -> float:
    """Modelled microseconds of PyTorch's product of all dY side by side, after a copy of them, with a shared X."""
    copied = 2.0 * problem.tokens * sum(problem.parts) * problem.itemsize / (0.85e3 * target.bandwidth)
    return predict_torch(replace(problem, parts=()), target).microseconds + NEXT_PRODUCT + copied


def norm_microseconds(problem: Problem, target: Target) -> float:
    """Modelled microseconds of PyTorch's squared norm of a result: it is read, and two small kernels follow."""
    return 3 * NEXT_PRODUCT + problem.rows * problem.cols * problem.out_itemsize / (0.85e3 * target.bandwidth)


def _measured(problem: Problem, target: Target, table: Table | None) -> tuple[bool, Config | None]:
    """Whether measurements decide, and for what."""
    found = None if table is None else table.find(problem, target)
    if found is None:
        return False, None
    config, speedup = found
    if speedup < MEASURED_MARGIN:
        return True, None
    return config is not None, config


def _modelled(problem: Problem, target: Target, theirs: float, split: bool = True) -> Config | None:
    config = pick(problem, target, split)
    return config if theirs / predict(config, problem, target).microseconds >= MODEL_MARGIN else None
