"""What a run of `bench.gpu_suite` measured beside what was predicted before it, and what is furthest off.

python -m bench.suite_report bench/results/nvidia-h200/suite.json
python -m bench.suite_report SUITE.json --markdown --table chunkft/kernels/tables/sm90.json

Predictions are those of `bench.predictions`, committed before the first run under `bench/results/predicted/`. A ratio
is measured over predicted: 1 where the model was right, so that the model is corrected and not the memory of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kernels import records_of, write_table_of
from .predictions import FOLDER

WORST = 3


@dataclass(frozen=True)
class Figure:
    """One number of a run: what it is, measured and predicted (None: there was no prediction), and its unit."""

    key: str
    measured: float
    predicted: float | None
    unit: str

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return None if not self.predicted else self.measured / self.predicted


@dataclass(frozen=True)
class Target:
    """A goal of the project, the number that is held against it, and whether it was reached."""

    name: str
    value: float
    bound: float
    at_most: bool

    @property
    def reached(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def shortfall(self) -> float:
        """How far from the bound, as a share of it; below 0 where it was reached."""
        off = self.value / self.bound if self.at_most else self.bound / max(self.value, 1e-12)
        return off - 1


def figures(suite: dict[str, Any], predicted: dict[str, Any]) -> list[Figure]:
    """All numbers of a suite that a prediction could be made for, in its order."""
    told = predicted.get("figures", {})
    found = []
    for name, row in suite["cases"].items():
        for key, value, unit in _values(name, row):
            found.append(Figure(key, value, told.get(key, {}).get("value"), unit))
    return found


def _values(name: str, row: dict[str, Any]) -> list[tuple[str, float, str]]:
    result = row.get("result") or {}
    if name == "contact/ceilings" and "found" in result:
        numbers = {k: v for k, v in result["found"].items() if not isinstance(v, dict)}
        numbers |= {f"link/{k}": v for k, v in result["found"].get("link_gb_s", {}).items()}
        units = {"copy_gb_s": "GB/s", "bf16_tflops": "TFLOP/s", "launch_us": "us"}
        return [(f"ceiling/{k}", float(v), units.get(k, "GB/s")) for k, v in numbers.items()]
    if name.startswith("paper/"):
        values = []
        for place, record in result.get("variants", {}).items():
            base = f"llama-2-7b/{place}"
            if record.get("peak_bytes"):
                values.append((f"{base}/peak", record["peak_bytes"] / 2**30, "GiB"))
                values.append((f"{base}/driver", record["driver_bytes"] / 2**30, "GiB"))
            if "mean_ms" in record:
                values.append((f"{base}/step", record["mean_ms"], "ms"))
            if "exposed_share" in record:
                values.append((f"{base}/exposed", record["exposed_share"], ""))
        return values
    if name.startswith("streamed/"):
        return [
            value
            for key, record in result.get("cases", {}).items()
            for value in _streamed_values(key, record)
        ]
    values = []
    for record in records_of(row):
        for field, side in (
            ("triton_us", "triton"),
            ("torch_us", "torch"),
            ("auto_us", "auto"),
            ("us", "kernel"),
        ):
            if field in record:
                values.append((f"{record['key']}/{side}", record[field], "us"))
    return values


def _streamed_values(key: str, record: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Peak and step of every place of a case of `bench.streamed`, and what its copies cost."""
    values = []
    for place, figures in record.get("variants", {}).items():
        if figures.get("peak_bytes"):
            values.append((f"streamed/{key}/{place}/peak", figures["peak_bytes"] / 2**30, "GiB"))
        values.append((f"streamed/{key}/{place}/step", figures["step_ms"], "ms"))
    for place, exposed in record.get("exposed", {}).items():
        values.append((f"streamed/{key}/{place}/exposed", exposed["share_of_step"], ""))
    return values


def targets(suite: dict[str, Any]) -> list[Target]:
    """Each goal for an H100 or H200 that this run has a number for; of many numbers the worst."""
    records = [
        r for name, row in suite["cases"].items() if name.startswith("kernels/") for r in records_of(row)
    ]
    found = []

    def least(name: str, values: Sequence[float], bound: float) -> None:
        if values:
            found.append(Target(name, min(values), bound, at_most=False))

    timed = [r for r in records if "auto_speedup" in r]
    least(
        "auto against cuBLAS, worst shape, x", [r["auto_speedup"] for r in timed if r["form"] != "group"], 1.0
    )
    least("slices that share X, worst, x", [r["auto_speedup"] for r in timed if r["form"] == "group"], 1.3)
    updates = [r["of_copy"] for r in records if r["key"].startswith("adamw/residual/") and "of_copy" in r]
    if updates:
        found.append(Target("AdamW with residual, of a copy's rate", max(updates), 0.9, at_most=False))
    places = {
        place: record
        for name, row in suite["cases"].items()
        if name.startswith("paper/")
        for place, record in ((row.get("result") or {}).get("variants", {})).items()
        if "error" not in record
    }
    peaks = [record["peak_bytes"] / 2**30 for record in places.values() if record.get("peak_bytes")]
    if peaks:
        found.append(Target("Llama-2-7B, 1,024 tokens, least peak, GiB", min(peaks), 13.2, at_most=True))
    paged = places.get("paged K=32")
    if paged is not None and "exposed_share" in paged:
        found.append(Target("exposed paging, share of a step", paged["exposed_share"], 0.02, at_most=True))
    if paged is not None and "adamw" in places:
        ratio = paged["mean_ms"] / places["adamw"]["mean_ms"]
        found.append(Target("step over full AdamW's", ratio, 0.5, at_most=True))
    for name, row in suite["cases"].items():
        for key, record in (
            (row.get("result") or {}).get("cases", {}).items() if name.startswith("streamed/") else ()
        ):
            for one in record.get("targets", ()):
                at_most = one["name"].startswith("peak")
                found.append(Target(f"streamed {key}, {one['name']}", one["value"], one["bound"], at_most))
    return found


def lines(suite: dict[str, Any], predicted: dict[str, Any]) -> list[str]:
    """The report as text."""
    rows = suite["cases"]
    ended = sum(row["verdict"] == "ok" for row in rows.values())
    shown = [
        f"{suite.get('gpu', suite['device'])}, {suite['kind']}, commit {suite['commit'][:12]}, {suite['time']}"
    ]
    shown.append(f"{ended} of {len(rows)} cases ended well")
    for name, row in rows.items():
        if row["verdict"] != "ok":
            said = next((line for line in reversed(row.get("output", [])) if line.strip()), "")
            shown.append(f"  {name}: {row['verdict']} {said.strip()[:140]}")
    if suite["kind"] != "measured":
        return [
            *shown,
            f"{suite['kind']} on a CPU, small: its figures mean nothing and are held against none",
        ]
    shown.append("targets:")
    reached = targets(suite)
    for target in reached:
        sign = "<=" if target.at_most else ">="
        verdict = "reached" if target.reached else "MISSED"
        shown.append(f"  {target.name}: {target.value:.3f} ({sign} {target.bound:g}) {verdict}")
    if not reached:
        shown.append("  no number of this run is held against one")
    told = [figure for figure in figures(suite, predicted) if figure.ratio]
    if told:
        shown.append(f"measured over predicted ({predicted.get('gpu', '?')}, {predicted.get('time', '?')}):")
        for kind in dict.fromkeys(figure.key.rsplit("/", 1)[1] for figure in told):
            ratios = [figure.ratio for figure in told if figure.key.endswith("/" + kind)]
            assert all(ratios)
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios if ratio))
            low, high = min(r for r in ratios if r), max(r for r in ratios if r)
            shown.append(
                f"  {kind}: geometric mean {mean:.2f}, {low:.2f} to {high:.2f} over {len(ratios)} figures"
            )
        told.sort(key=lambda figure: -abs(math.log(figure.ratio or 1.0)))
        shown.append("furthest off:")
        shown += [_line(figure) for figure in told[: 4 * WORST]]
    missed = sorted((t for t in reached if not t.reached), key=lambda target: -target.shortfall)
    shown.append(
        "worst: " + ("; ".join(f"{t.name} {t.value:.3f}" for t in missed[:WORST]) or "no target was missed")
    )
    return shown


def _line(figure: Figure) -> str:
    return (
        f"  {figure.key}: {figure.measured:.4g} {figure.unit}, predicted {figure.predicted:.4g}, "
        f"ratio {figure.ratio:.2f}"
    )


def markdown(suite: dict[str, Any], predicted: dict[str, Any]) -> str:
    """All figures as a Markdown table."""
    rows = ["| figure | measured | predicted | ratio |", "|---|---|---|---|"]
    for figure in figures(suite, predicted):
        told = "" if figure.predicted is None else f"{figure.predicted:.4g}"
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        rows.append(f"| {figure.key} | {figure.measured:.4g} {figure.unit} | {told} | {ratio} |")
    return "\n".join(rows)


def prediction_for(suite: dict[str, Any], folder: Path = FOLDER) -> dict[str, Any]:
    """The committed predictions for a suite's GPU; nothing where there are none for it."""
    name = suite.get("gpu", "").lower().replace(" ", "")
    for path in sorted(folder.glob("*.json")):
        if path.stem in name:
            return dict(json.loads(path.read_text()))
    return {}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.suite_report", description=__doc__.split("\n")[0])
    parser.add_argument("suite", type=Path, help="suite.json of a device")
    parser.add_argument("--predicted", type=Path, help="predictions (default: those committed for the GPU)")
    parser.add_argument("--markdown", action="store_true", help="every figure, as a Markdown table")
    parser.add_argument("--table", type=Path, help="write the table that backend='auto' reads")
    args = parser.parse_args(arguments)
    try:
        suite = json.loads(args.suite.read_text())
        suite["cases"]["contact/machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.suite} holds no results of bench.gpu_suite: {type(error).__name__}: {error}")
    predicted = json.loads(args.predicted.read_text()) if args.predicted else prediction_for(suite)
    print(markdown(suite, predicted) if args.markdown else "\n".join(lines(suite, predicted)))
    if args.table is not None:
        if suite["kind"] != "measured":
            parser.error(f"--table needs measurements; {args.suite} was {suite['kind']}")
        write_table_of(suite, args.table)
        print(f"{args.table}: written")


if __name__ == "__main__":
    main()
