"""Whether a base optimizer updates every element by itself, found out by trying it on small random tensors."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.optim.advanced import copied
from chunkft.optim.rule import UpdateRule
from chunkft.plan import ChunkPlan

LENGTH = 8  # of the dimension that is cut, into halves
WIDTHS = (6, 3, 2)  # of the others
STEPS = 4  # some bases only prepare in their first step
TOLERANCE = 1e-3  # relative; sums in another order are far below it, and so is rounding in float32
LEAST_LR = 1e-2  # smaller updates would drown in rounding, and with lr=0 nothing could be seen

# Known, and tried in the tests: the usual ones cost nothing at construction.
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in [
        "SGD",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "Adagrad",
        "Adadelta",
        "RMSprop",
        "ASGD",
        "Rprop",
    ]
)

Outcome = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass(frozen=True)
class Coupling:
    """What an update of a base depends on beside the element itself.

    Attributes:
        rows: relative difference between the update of the halves of a tensor and of the whole.
        others: the same for a parameter alone and together with another one.
        failure: why nothing can be said, or None.
    """

    rows: float = 0.0
    others: float = 0.0
    failure: str | None = None


def check_coupling(
    rule: UpdateRule, plan: ChunkPlan, parameter_of: Callable[[str], Tensor], units: int, ranks: int = 1
) -> None:
    """Try the base the way the plan uses it.

    Warns if updates of slices are not the slices of updates, and if that cannot be found out.

    Args:
        rule: how slices are updated.
        plan: the slices.
        parameter_of: the full parameter of a name.
        units: number of parts that are updated one after the other inside of a step, at most.
        ranks: number of processes that update a part each; ``plan`` is that of all of them, so that all say the same.

    Raises:
        ValueError: if an update depends on parameters that are not updated together with it.
    """
    if rule.base in ELEMENTWISE:
        return
    apart = max(len(plan.chunks), units, ranks) > 1
    tried: dict[str, Coupling] = {}
    for group, dims, cut, device in _uses(rule, plan, parameter_of):
        key = repr((_shape_of_rule(rule.groups[group]), dims, cut))
        if key not in tried:
            tried[key] = _try(rule, group, dims, cut, apart, device)
    name = rule.base.__name__
    if any(coupling.others > TOLERANCE for coupling in tried.values()):
        parts = f"{len(plan.chunks)} chunks" if len(plan.chunks) > 1 else f"{units} pages in every step"
        way_out = "use chunks=1 and residency='chunk', or"
        if ranks > 1:
            parts, way_out = f"{ranks} processes that each update a part", "train in one process, or use"
        raise ValueError(
            f"base={name} cannot be used with {parts}: its update of a parameter depends on the other parameters "
            f"that are updated with it, so it would depend on how they are cut; {way_out} a base that updates each "
            "parameter by itself"
        )
    rows = max((coupling.rows for coupling in tried.values()), default=0.0)
    if rows > TOLERANCE:
        way_out = (
            "with whole parameters (partition='layers', or a plan made with chunkft.partition(..., atomic='*')) it is "
            "exact"
        )
        if ranks > 1:
            way_out = "each rank owns parts of parameters"
        warnings.warn(
            f"base={name} does not update each element by itself, so the update of a slice is not the slice of the "
            f"update of the whole parameter: {rows:.0%} off on halves of a random tensor. Statistics of a slice take "
            f"the place of those of its parameter; {way_out}",
            stacklevel=4,
        )
    failure = next((coupling.failure for coupling in tried.values() if coupling.failure), None)
    if failure is not None:
        warnings.warn(
            f"it is not known whether base={name} updates each element by itself, which slices need to be exact: "
            f"{failure}",
            stacklevel=4,
        )


def is_cut(piece: Slice) -> bool:
    """Whether a slice is only a part of its parameter."""
    return piece.dim is not None and piece.stop - piece.start < piece.parameter_shape[piece.dim]


def _uses(
    rule: UpdateRule, plan: ChunkPlan, parameter_of: Callable[[str], Tensor]
) -> Iterator[tuple[int, int, int | None, torch.device]]:
    """Group, number of dimensions, dimension that is cut, and device of every kind of slice."""
    seen = set()
    for piece in plan.slices():
        dim = piece.dim if is_cut(piece) else None
        kind = (rule.group_of[piece.name], len(piece.parameter_shape), dim, parameter_of(piece.name).device)
        if kind not in seen:
            seen.add(kind)
            yield kind


def _shape_of_rule(group: dict[str, Any]) -> list[tuple[str, Any]]:
    """What may change the kind of an update: groups are often many that differ in names and rates only."""
    aside = ("params", "lr", "initial_lr", "weight_decay", "name", "param_names")
    return [(key, value) for key, value in group.items() if key not in aside]


def _try(
    rule: UpdateRule, group: int, dims: int, cut: int | None, apart: bool, device: torch.device
) -> Coupling:
    if cut is None and not apart:
        return Coupling()
    # In float64 small updates show; kernels may know float32 only, or no CPU.
    places = [(torch.float64, torch.device("cpu")), (torch.float32, torch.device("cpu"))]
    if device.type != "cpu":
        places.append((torch.float32, device))
    failure = ""
    for dtype, where in places:
        try:
            with _randomness_kept(where), warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                return _compare(rule, group, _sample(dims, cut or 0, dtype, where), cut, apart)
        except Exception as error:  # any optimizer may be given, and may fail in any way
            failure = f"a trial on a small tensor failed with {type(error).__name__}: {error}"
    return Coupling(failure=failure)


def _compare(rule: UpdateRule, group: int, sample: list[Tensor], cut: int | None, apart: bool) -> Coupling:
    """The differences for one kind of slice; ``sample`` is a value and its gradients."""
    (whole,), values = _run(rule, group, [sample])
    scale = float(whole.norm())
    if not 0 < scale < math.inf:
        return Coupling(failure=f"in a trial its updates had the norm {scale}")
    rows = others = 0.0
    if cut is not None:
        halves = [[tensor.chunk(2, cut)[half] for tensor in sample] for half in (0, 1)]
        parts, _ = _run(rule, group, halves)
        rows = _difference([whole], [torch.cat(parts, cut)])
    if apart:
        other = [tensor.flip(0) * 3 for tensor in sample]
        together, shared = _run(rule, group, [sample, other])
        others = max(_difference([whole], together[:1]), _values_differ(values, shared))
    differs = max(rows, others) > TOLERANCE
    if differs and _difference([whole], _run(rule, group, [sample], seed=1)[0]) > TOLERANCE:
        return Coupling(failure="its updates are random")
    return Coupling(rows, others)


def _run(rule: UpdateRule, group: int, samples: Sequence[list[Tensor]], seed: int = 0) -> Outcome:
    """How far each parameter moved, and the numbers in the groups, after some steps."""
    _seed(samples[0][0].device, seed)
    parameters = [nn.Parameter(value.clone()) for value, *_ in samples]
    base = rule.make_base([{**_options(rule.groups[group]), "params": parameters}])
    for number in range(STEPS):
        for parameter, (_, *gradients) in zip(parameters, samples, strict=True):
            parameter.grad = gradients[number].clone()
        base.step()
    moved = [parameter.detach() - value for parameter, (value, *_) in zip(parameters, samples, strict=True)]
    return moved, base.param_groups


def _seed(device: torch.device, seed: int) -> None:
    """Seed what a trial may draw from; ``torch.manual_seed`` would seed every device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    options = {key: copied(value) for key, value in group.items() if key != "params"}
    lr = options.get("lr")
    if isinstance(lr, Tensor):
        options["lr"] = lr.cpu().clamp(min=LEAST_LR)
    elif isinstance(lr, int | float):
        options["lr"] = max(lr, LEAST_LR)
    # What asks for a device changes the implementation and not the update.
    return options | {key: False for key in ("fused", "capturable") if options.get(key)}


def _sample(dims: int, cut: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A value and its gradients, whose rows differ in size; a gradient is like the one before, as in training."""
    shape = [*WIDTHS, *[2] * dims][: max(0, dims - 1)]
    if dims:
        shape.insert(cut, LENGTH)
    source = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    rows = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    scale = rows.view([-1 if dim == cut else 1 for dim in range(dims)]) if dims else torch.ones(())
    first = draw()
    tensors = [draw(), *((first + 0.3 * draw()) * scale for _ in range(STEPS))]
    return [tensor.to(device, dtype).contiguous() for tensor in tensors]


def _difference(exact: list[Tensor], other: list[Tensor]) -> float:
    """Norm of the difference of one tensor from another, relative to the first."""
    (one,), (two,) = exact, other
    difference = float((one - two).norm() / one.norm())
    return difference if math.isfinite(difference) else 1.0


def _values_differ(alone: list[dict[str, Any]], together: list[dict[str, Any]]) -> float:
    """Greatest relative difference of numbers in the groups."""
    most = 0.0
    for a, b in zip(alone, together, strict=True):
        for key in a.keys() & b.keys() - {"params"}:
            one, two = (float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for v in (a[key], b[key]))
            if isinstance(one, float) and isinstance(two, float) and one != two:
                most = max(most, abs(one - two) / max(abs(one), abs(two)))
    return most


@contextmanager
def _randomness_kept(device: torch.device) -> Iterator[None]:
    """Give every source of random numbers back as it was."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)
