"""What became slower, or larger, between two results of the same benchmark, or between a git revision and this tree.

python -m bench.compare OLD.json NEW.json         two result files
python -m bench.compare --rev HEAD~1              steps of both, processes interleaved, each with this tree's benchmarks

The exit status is 1 if there are regressions, one line each. Times count where the interval of the ratio lies beyond
the noise: of the A/A run in the file, or of one half of the samples against the other. Results of two occasions are
compared after division by full AdamW of the same file, which knows nothing of chunkft, so that a slower machine is no
regression. Bytes count from 1 %, rates without samples from 20 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import common, harness, revision

SAMPLES = ("samples_ms", "steps_ms")
CONTROL = "adamw"
BYTES = {"gradients", "state", "masters", "saved_activations", "peak_bytes", "held_bytes"}
BYTES_TOLERANCE = 0.01
RATES = {"load", "store", "both", "speedup", "tflops"}
RATE_TOLERANCE = 0.20


@dataclass(frozen=True)
class Change:
    """One quantity of both files: its ratio new / old, and what it means."""

    name: str
    ratio: harness.Interval
    verdict: str

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "larger")

    def __str__(self) -> str:
        return f"{self.name:44s} new / old {self.ratio}, {self.verdict}"


def samples(data: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every entry with samples: its path, itself, and the key of the samples."""
    for key, value in _children(data):
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            for name in SAMPLES:
                found = value.get(name) or []
                if isinstance(found, dict):  # of several variants that took turns
                    for variant, taken in found.items():
                        if len(taken) > 1:
                            yield f"{inner}.{variant}", {name: taken}, name
                elif len(found) > 1:
                    yield inner, value, name
        yield from samples(value, inner)


def scalars(data: Any, names: set[str], path: str = "") -> Iterator[tuple[str, float]]:
    """Every number above 0 under one of these keys, with its path."""
    for key, value in _children(data):
        inner = f"{path}.{key}" if path else str(key)
        if key in names and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield inner, float(value)
        yield from scalars(value, names, inner)


def _children(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        yield from data.items()
    elif isinstance(data, list):
        for number, value in enumerate(data):
            label = value.get("variant", value.get("name", number)) if isinstance(value, dict) else number
            if isinstance(label, dict):
                label = ",".join(f"{k}={v}" for k, v in label.items())
            yield str(label), value


def own_noise(values: Sequence[float], seed: int = 0) -> float:
    """Noise seen within one run: its even samples against its odd ones; 0.5 where there are fewer than four."""
    if len(values) < 4:
        return 0.5
    half = len(values) // 2
    return harness.noise_of(harness.ratio(values[: 2 * half : 2], values[1 : 2 * half : 2], False, seed))


def compare(old: dict[str, Any], new: dict[str, Any], control: str | None = CONTROL) -> list[Change]:
    """Changes of every quantity that both results hold; raises ValueError where they share none."""
    before = {name: (entry, key) for name, entry, key in samples(old)}
    after = {name: (entry, key) for name, entry, key in samples(new)}
    scale = {name: _scale(before, after, name, control) for name in before.keys() & after.keys()}
    changes = []
    for name in [name for name in before if name in after]:
        (was, key), (now, same_key) = before[name], after[name]
        if key != same_key:
            continue
        noise = max(_noise(old, was[key]), _noise(new, now[key]))
        found = harness.ratio([v / scale[name] for v in now[key]], was[key], paired=False)
        if control is not None and name.rpartition(".")[2] == control:
            changes.append(Change(name, found, "the machine, by which the others are divided"))
            continue
        # The files were made at different times: what differs less than twice the noise of each is not told apart.
        changes.append(Change(name, found, harness.verdict(found, 2 * noise, limit=2 * harness.TOO_NOISY)))
    changes += _scalar_changes(old, new)
    if not changes:
        raise ValueError("the two results have no samples, bytes or rates in common")
    return changes


def _noise(result: dict[str, Any], values: Sequence[float]) -> float:
    return float(result["noise"]) if "noise" in result else own_noise(values)


def _scale(before: dict[str, Any], after: dict[str, Any], name: str, control: str | None) -> float:
    """By how much the machine was slower for the control beside `name`; 1 without one, and for the control itself."""
    if control is None:
        return 1.0
    other = ".".join([*name.split(".")[:-1], control])
    if other == name or other not in before or other not in after:
        return 1.0
    (was, key), (now, same_key) = before[other], after[other]
    return harness.ratio(now[same_key], was[key], paired=False).ratio


def _scalar_changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    for names, tolerance, worse, better in (
        (BYTES, BYTES_TOLERANCE, "larger", "smaller"),
        (RATES, RATE_TOLERANCE, "faster", "slower"),
    ):
        before, after = dict(scalars(old, names)), dict(scalars(new, names))
        for name in [name for name in before if name in after]:
            value = after[name] / before[name]
            word = worse if value > 1 + tolerance else better if value < 1 / (1 + tolerance) else "same"
            yield Change(name, harness.Interval(value, value, value), word)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="OLD.json NEW.json")
    parser.add_argument(
        "--rev", metavar="GITREV", help="compare the step benchmark of a revision with this tree's"
    )
    parser.add_argument("--rounds", type=int, default=6, help="with --rev: processes of each (default 6)")
    parser.add_argument("--model", default="3M", help="with --rev: shape of the model (default 3M)")
    parser.add_argument(
        "--no-control", action="store_true", help="do not divide by full AdamW of the same file"
    )
    parser.add_argument("--all", action="store_true", help="show every quantity, not only what changed")
    parser.add_argument("--out", type=Path, help="with --rev: JSON of the samples")
    args = parser.parse_args(arguments)
    if (args.rev is None) != (len(args.files) == 2) or (args.rev is not None and args.files):
        parser.error("give OLD.json and NEW.json, or --rev GITREV")
    try:
        if args.rev is not None:
            result = revision.compare(args.rev, args.model, args.rounds)
            if args.out is not None:
                common.write_json(args.out, common.header(0) | result)
            print(harness.noise_line(result["noise"]))
            changes = [
                Change(name, harness.Interval(**row["over_old"]), row["verdict"])
                for name, row in result["variants"].items()
            ]
        else:
            old, new = (json.loads(path.read_text()) for path in args.files)
            for key in ("device", "threads"):
                if old.get(key) != new.get(key):
                    print(f"note: {key} differs: {old.get(key)} and {new.get(key)}")
            changes = compare(old, new, None if args.no_control else CONTROL)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"bench.compare: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for change in changes:
        if args.all or change.verdict != "same":
            print(change)
    worse = [change for change in changes if change.regression]
    print(f"{len(changes)} compared, {len(worse)} regressions")
    for change in worse:
        print(f"REGRESSION {change}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
