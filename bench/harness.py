"""Comparing functions on a machine that does other work too: interleaved samples, intervals, the machine's noise.

A run of the first variant against itself comes first. How far apart the two seem is noise: a ratio counts only where
its whole interval is further from 1 than that, and where the noise is too large no conclusion is drawn. Then every
round calls each variant once, in an order that turns round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

AGAIN = "again"  # name of the first variant's second sample
TOO_NOISY = 0.10
RESAMPLES = 2000
ROUNDS = 15

Run = Callable[[], Any]


class CheckFailed(RuntimeError):
    """A variant computes something else than it should, so that its time means nothing."""


@dataclass(frozen=True)
class Interval:
    """A ratio of medians with the bounds between which 95 % of the resampled ratios lie."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(over: Sequence[float], under: Sequence[float], paired: bool = True, seed: int = 0) -> Interval:
    """Median of `over` divided by that of `under`, with a bootstrap interval.

    Where they are `paired`, entries of the same number come from the same round and are drawn together, which leaves
    out what disturbs both. Raises ValueError for fewer than two samples, samples that are not above 0, or pairs of
    unequal number.
    """
    if paired and len(over) != len(under):
        raise ValueError(f"over has {len(over)} samples and under {len(under)}: pairs need as many of each")
    for name, samples in (("over", over), ("under", under)):
        if len(samples) < 2 or min(samples) <= 0:
            raise ValueError(
                f"{name} has {len(samples)} samples, the least {min(samples, default=None)}: needs 2 above 0"
            )
    a, b = torch.tensor(over, dtype=torch.float64), torch.tensor(under, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(a), (RESAMPLES, len(a)), generator=generator)
    second = first if paired else torch.randint(len(b), (RESAMPLES, len(b)), generator=generator)
    drawn = a[first].quantile(0.5, dim=1) / b[second].quantile(0.5, dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(statistics.median(over) / statistics.median(under), low, high)


def noise_of(again: Interval) -> float:
    """How far from 1 the ratio of a variant to itself may lie on this machine, as a share: 0.03 is 3 %."""
    return max(math.exp(abs(math.log(bound))) - 1 for bound in (again.ratio, again.low, again.high))


def verdict(found: Interval, noise: float, limit: float = TOO_NOISY) -> str:
    """`slower`, `faster` or `same`: whether the whole interval lies beyond the noise; `too noisy` above `limit`."""
    if noise > limit:
        return "too noisy"
    if found.low > 1 + noise:
        return "slower"
    if found.high < 1 / (1 + noise):
        return "faster"
    return "same"


def interleave(
    variants: Mapping[str, Run],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warmup: int = 1,
    per_call: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after `warmup` untimed rounds; a sample is the mean of `per_call` calls.

    Odd rounds run in reverse order. Raises ValueError for no variants, or fewer than two rounds.
    """
    if not variants or rounds < 2:
        raise ValueError(
            f"{len(variants)} variants, rounds={rounds}: needs one variant and two rounds or more"
        )
    order = list(variants.items())
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, run in order if number % 2 else reversed(order):
            start = clock()
            for _ in range(per_call):
                run()
            if number >= warmup:
                taken[name].append((clock() - start) / per_call)
    return taken


def checked(checks: Mapping[str, Callable[[], str | None]]) -> None:
    """Runs every check; raises CheckFailed with what those say that return a text."""
    said = {name: check() for name, check in checks.items()}
    wrong = [f"{name}: {text}" for name, text in said.items() if text]
    if wrong:
        raise CheckFailed("; ".join(wrong))


def measure(
    variants: Mapping[str, Run],
    checks: Mapping[str, Callable[[], str | None]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    **options: int,
) -> dict[str, Any]:
    """Samples, medians in ms, the ratio of each variant to the first, and the noise, ready for JSON.

    An A/A run comes first: where the machine is too noisy, verdicts say so. Raises CheckFailed, and times nothing,
    where a check returns a text.
    """
    checked(checks)
    first = next(iter(variants))
    run = variants[first]
    alone = interleave({first: run, AGAIN: run}, rounds, clock, **options)
    noise = noise_of(ratio(alone[AGAIN], alone[first], seed=seed))
    samples = interleave(variants, rounds, clock, **options)
    return {"noise": noise, "too_noisy": noise > TOO_NOISY, "base": first} | {
        "variants": summary(samples, first, noise, seed)
    }


def summary(
    samples: Mapping[str, Sequence[float]], base: str, noise: float, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Of every variant: median and samples in ms, its ratio to `base` with the interval, and the verdict."""
    found = {}
    for name, values in samples.items():
        against = ratio(values, samples[base], seed=seed)
        found[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "over_base": asdict(against),
            "verdict": "base" if name == base else verdict(against, noise),
            "samples_ms": [round(1e3 * value, 4) for value in values],
        }
    return found


def noise_line(noise: float) -> str:
    """The A/A run in one line."""
    if noise > TOO_NOISY:
        return (
            f"noise {noise:.1%}: a variant against itself differs by more than {TOO_NOISY:.0%}, so this machine is too"
            " noisy to conclude anything now"
        )
    return f"noise {noise:.1%}: smaller differences are not told from none"


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result of `measure`, one line a variant, the noise first."""
    shown = [noise_line(result["noise"])]
    for name, row in result["variants"].items():
        against = Interval(**row["over_base"])
        shown.append(f"{name:24s} {row['median_ms']:9.3f} ms, {against} x {result['base']}, {row['verdict']}")
    return shown
