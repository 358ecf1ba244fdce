"""Step time of streamed weights beside resident ones, and beside the same steps without copies and without compute.

python -m bench.streamed                       28M parameters on a CPU; Llama-2-7B at 1,024 and 4,096 tokens on a GPU
python -m bench.streamed --tokens 1024 --resident 0 8 16 --places resident host
python -m bench.streamed --quick

Every round takes a turn of each variant, in an order that turns round. What the copies of the weights cost is the
streamed step less the one whose slots are handed out without their bytes, in the same round: measured, not inferred
from bandwidths. "no compute" is the page traffic of a step alone: what would be exposed if nothing hid it. A step is
the mean over blocks, spread evenly over the depth, that are trained in turn; switches are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import common, plain_llama
from .records import Records
from .streamed_setup import PLACES, Setting, Trial, made, variants

GIB = 2**30
PEAK_GIB, SPEED, SPEED_TOKENS = 4.5, 0.9, 4096  # what is to be reached with Llama-2-7B
STREAMED = ("host", "device")
Seconds = tuple[float, float]  # of forward and backward, of the update
Positions = list[list[Seconds]]  # of a variant, by position and round


class Peaks:
    """The most that each trial had on the device at a time, while others are there too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._held: dict[Trial, int] = {}
        self.peaks: dict[Trial, int] = {}

    def of(self, trial: Trial) -> int | None:
        """Bytes; None on a CPU."""
        return self.peaks.get(trial)

    def made(self, make: Callable[[], Trial]) -> Trial:
        """What `make` makes, whose memory is its own from now on."""
        before = self._now()
        trial = make()
        self._held[trial] = self._now() - before
        return trial

    @contextlib.contextmanager
    def watching(self, trial: Trial) -> Any:
        """What is taken inside belongs to this trial."""
        if self._device is None:
            yield
            return
        before = self._now()
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        most = torch.cuda.max_memory_allocated(self._device) - (before - self._held[trial])
        self.peaks[trial] = max(self.peaks.get(trial, 0), most)
        self._held[trial] += self._now() - before

    def _now(self) -> int:
        return 0 if self._device is None else torch.cuda.memory_allocated(self._device)


def measure(setting: Setting, places: Sequence[str]) -> dict[str, Any]:
    """Figures of one case: see `figures_of`."""
    peaks = Peaks(setting.device)
    trials: dict[str, Trial] = {}
    errors: dict[str, str] = {}
    try:
        for place in places:
            try:
                trials[place] = peaks.made(lambda place=place: made(setting, [place])[place])  # type: ignore[misc]
            except (torch.OutOfMemoryError, OSError) as error:  # that it does not fit is a result
                errors[place] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        samples, traffic = run_rounds(setting, trials, peaks)
        found = figures_of(setting, samples, traffic)
        for place, trial in trials.items():
            found["variants"][place] |= {"peak_bytes": peaks.of(trial), "final_loss": trial.loss}
        found["bytes"] = {place: bytes_by_kind(trial) for place, trial in trials.items()}
        chunk = trials[next(iter(trials))].optimizer.plan.chunks[0]
        found["chunk_elements"] = chunk.numel
        found["parameters"] = sum(p.numel() for p in trials[next(iter(trials))].model.parameters())
        return found | {"errors": errors}
    finally:
        for trial in trials.values():
            trial.close()


def run_rounds(
    setting: Setting, trials: dict[str, Trial], peaks: Peaks
) -> tuple[dict[str, Positions], dict[str, list[dict[str, int]]]]:
    """Seconds of every variant in the timed rounds of each position, and the bytes that it moved, beside those that it
    should have.
    """
    turns = variants(trials)
    samples: dict[str, Positions] = {name: [] for name in turns}
    traffic: dict[str, list[dict[str, int]]] = {name: [] for name in turns}
    for _ in range(setting.positions):
        for name in turns:
            samples[name].append([])
        for number in range(setting.rounds + 2):  # the first makes state, the last changes the block
            timed = 0 < number <= setting.rounds
            for name, (trial, run) in turns.items() if number % 2 else reversed(turns.items()):
                streams = trial.stream is not None
                before, expected = (trial.loaded(), trial.expected()) if streams else (0, 0)
                with peaks.watching(trial):
                    seconds = run()
                if timed:
                    samples[name][-1].append(seconds)
                if number == 1 and streams:
                    traffic[name].append({"moved": trial.loaded() - before, "expected": expected})
    return samples, traffic


def figures_of(
    setting: Setting, samples: dict[str, Positions], traffic: dict[str, list[dict[str, int]]]
) -> dict[str, Any]:
    """Milliseconds of every variant, what the copies cost, and speed against resident weights.

    A step is the mean over positions of the median over rounds. Differences and ratios are taken in each round.
    """
    found: dict[str, Any] = {"variants": {}, "exposed": {}, "speed": {}}
    for name, positions in samples.items():
        found["variants"][name] = {
            "step_ms": 1e3 * _step([[sum(one) for one in rounds] for rounds in positions]),
            "compute_ms": 1e3 * _step([[one[0] for one in rounds] for rounds in positions]),
            "update_ms": 1e3 * _step([[one[1] for one in rounds] for rounds in positions]),
            "positions_ms": [[round(1e3 * sum(one), 3) for one in rounds] for rounds in positions],
        }
        if traffic[name]:
            moved, expected = (sum(one[key] for one in traffic[name]) for key in ("moved", "expected"))
            found["variants"][name] |= {
                "moved_bytes": moved // len(traffic[name]),
                "expected_bytes": expected // len(traffic[name]),
            }
    alone = found["variants"].get("no compute")
    for place in STREAMED:
        if place not in samples:
            continue
        stale = f"{place}, no copy"
        pairs = _paired(samples[place], samples[stale])
        low, _, high = common.quartiles([1e3 * (a[0] - b[0]) for a, b in pairs])
        step = found["variants"][place]["step_ms"]
        # the update waits for no weights
        exposed = found["variants"][place]["compute_ms"] - found["variants"][stale]["compute_ms"]
        found["exposed"][place] = {
            "ms": exposed,
            "quartiles_ms": [low, high],
            "share_of_step": exposed / step,
            "share_of_traffic": exposed / alone["step_ms"],
        }
        if "resident" in samples:
            pairs = _paired(samples[place], samples["resident"])
            low, _, high = common.quartiles([sum(b) / sum(a) for a, b in pairs])
            found["speed"][place] = {
                "of_resident": found["variants"]["resident"]["step_ms"] / step,
                "quartiles": [low, high],
            }
    return found


def _step(positions: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(statistics.median(rounds) for rounds in positions)


def _paired(one: Positions, other: Positions) -> list[tuple[Seconds, Seconds]]:
    """Samples of the same rounds."""
    return [pair for mine, theirs in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]


def bytes_by_kind(trial: Trial) -> dict[str, dict[str, int]]:
    """What a trial holds on the device and in host memory; gradients and state are those of the largest chunk."""
    report = trial.optimizer.memory_report()
    device = {
        "weights": report.weights.now,
        "leaves": report.leaves.predicted,
        "gradients": report.gradients.predicted,
        "state": report.state_device.predicted,
        "masters": report.masters.predicted,
    }
    if trial.stream is not None:
        memory = trial.stream.memory()
        del device["weights"]
        device = {f"weights, {kind}": memory[kind] for kind in ("resident", "ring", "tiles")} | device
    host = {
        "weights": report.weights_host.now,
        "gradients": report.gradients_host.predicted,
        "state": report.state_host.predicted,
    }
    return {
        place: {kind: size or 0 for kind, size in kinds.items()}
        for place, kinds in (("device", device), ("host", host))
    }


def targets(setting: Setting, result: dict[str, Any]) -> list[dict[str, Any]]:
    """What Llama-2-7B on a GPU is to reach with all blocks streamed, and whether the better place of the update did."""
    if setting.device.type != "cuda" or setting.model != "llama-2-7b" or setting.resident:
        return []
    found = []
    peaks = [
        result["variants"][place]["peak_bytes"] / GIB for place in STREAMED if place in result["variants"]
    ]
    if peaks:
        found.append(
            {"name": "peak, GiB", "value": min(peaks), "bound": PEAK_GIB, "reached": min(peaks) <= PEAK_GIB}
        )
    speeds = [entry["of_resident"] for entry in result["speed"].values()]
    if speeds and setting.tokens >= SPEED_TOKENS:
        best = max(speeds)
        found.append({"name": "speed of resident", "value": best, "bound": SPEED, "reached": best >= SPEED})
    return found


def lines_of(key: str, result: dict[str, Any]) -> list[str]:
    """One line a variant, and one for each target."""
    if "error" in result:
        return [f"{key}: {result['error']}"]
    shown = []
    for name, row in result["variants"].items():
        line = f"{key:24s} {name:16s} {row['step_ms']:9.2f} ms (update {row['update_ms']:.2f})"
        if "moved_bytes" in row:
            line += f", {row['moved_bytes'] / 2**20:.1f} MiB up"
            line += "" if row["moved_bytes"] in (0, row["expected_bytes"]) else " (NOT AS COUNTED)"
        if name in result["exposed"]:
            exposed = result["exposed"][name]
            line += f", exposed {exposed['ms']:.2f} ms, {exposed['share_of_traffic']:.0%} of the traffic"
        if name in result["speed"]:
            line += f", {result['speed'][name]['of_resident']:.1%} of the resident speed"
        if name in result["bytes"]:
            line += f", weights on the device {_weights(result['bytes'][name]) / 2**20:.1f} MiB"
        if row.get("peak_bytes"):
            line += f", peak {row['peak_bytes'] / GIB:.2f} GiB"
        shown.append(line)
    shown += [f"{key:24s} {place:16s} {said}" for place, said in result["errors"].items()]
    for target in result["targets"]:
        word = "reached" if target["reached"] else "MISSED"
        shown.append(
            f"{key:24s} target: {target['name']} {target['value']:.3f} (bound {target['bound']:g}) {word}"
        )
    return shown


def _weights(kinds: dict[str, dict[str, int]]) -> int:
    return sum(size for kind, size in kinds["device"].items() if kind.startswith("weights"))


def cases(args: argparse.Namespace, gpu: bool) -> list[tuple[int, int, tuple[str, ...]]]:
    """Tokens, resident blocks and places of each case: all lengths streamed as a whole, the first one in part too."""
    if args.tokens or args.resident is not None:
        found = [(t, r) for t in args.tokens or (16,) for r in args.resident or (0,)]
        return [(t, r, tuple(args.places or PLACES)) for t, r in found]
    lengths, part = ((1024, 4096), (8, 16)) if gpu else ((16, 128), (4,))
    if args.quick:
        lengths, part = (16,), (2,)
    whole = [(tokens, 0, tuple(args.places or PLACES)) for tokens in lengths]
    return whole + [(lengths[0], r, tuple(args.places or ("resident", "host"))) for r in part]


def main(arguments: Sequence[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.streamed", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=plain_llama.SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", help="a step; the sequence is one")
    parser.add_argument("--resident", type=int, nargs="+", help="blocks that stay on the device")
    parser.add_argument("--places", nargs="+", choices=PLACES, help="of weights and update (default: all)")
    parser.add_argument("--positions", type=int, help="blocks that are trained in turn (default 4)")
    parser.add_argument("--rounds", type=int, help="timed ones at each position (default 5; 4 on a GPU)")
    threads = torch.get_num_threads() if gpu else 1
    parser.add_argument(
        "--threads",
        type=int,
        default=threads,
        help="default 1 on a CPU, where copies have one more; else all",
    )
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds and go on behind it")
    parser.add_argument(
        "--out", type=Path, help="default bench/results/streamed-cpu.json, or streamed-gpu.json"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    name = args.model or ("3M" if args.quick else "llama-2-7b" if gpu else "28M")
    out = args.out or common.RESULTS / f"streamed-{'gpu' if gpu else 'cpu'}.json"
    positions = args.positions or (2 if args.quick else 4)
    rounds = args.rounds or (2 if args.quick else 4 if gpu else 5)
    head = common.header(0) | {"model": name, "positions": positions, "rounds": rounds}
    records = Records(out, head, "cases", args.resume)
    for tokens, resident, places in cases(args, gpu):
        key = f"{name}/T{tokens}/resident{resident}"
        setting = Setting(
            name,
            tokens,
            resident,
            positions,
            rounds,
            None if gpu else 1 << 20,  # small models would keep their head on the device
            (64 if gpu else 1) << 20,
            torch.device("cuda" if gpu else "cpu"),
            torch.bfloat16 if gpu else torch.float32,
        )
        if key not in records:
            with records.case(key) as record:
                record |= {"tokens": tokens, "resident_blocks": resident} | measure(setting, places)
                record["targets"] = targets(setting, record)
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
        for line in lines_of(key, records[key]):
            print(line, flush=True)
    wrong = [
        f"{key} {name}"
        for key, record in records.items()
        for name, row in record.get("variants", {}).items()
        if row.get("moved_bytes", 0) not in (0, row.get("expected_bytes"))
    ]
    if wrong:
        raise SystemExit(f"the bytes that moved are not those of the formula: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
