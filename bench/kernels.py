"""Weight-gradient kernels against cuBLAS, or, without a GPU, what the picker predicts.

python -m bench.kernels                            all cases; on a CUDA device measured, elsewhere predicted
python -m bench.kernels --forms slice --tokens 4096 --models llama-3-8b
python -m bench.kernels --table chunkft/kernels/tables/sm90.json      measured configurations for `backend="auto"`
python -m bench.kernels --predict h100 a100        predictions for the named GPUs, on any machine

A measured case is checked first (the rule of the tests: at most twice cuBLAS's distance from fp64); where the check
fails there is no figure. Both sides take turns, with cold L2; medians are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from chunkft.kernels import measured, triton_wgrad
from chunkft.kernels.choice import by_one_product, choose, choose_group, one_by_one
from chunkft.kernels.heuristics import (
    Config,
    Problem,
    candidates,
    pick,
    predict,
    predict_torch,
    roofline,
    tiles,
)
from chunkft.kernels.targets import TARGETS, Target

from . import common
from .clock import Clock, Run
from .harness import CheckFailed
from .kernel_cases import CHUNKS, FORMS, MODELS, TOKENS, Case, cases, small
from .kernel_setup import EXPERTS_A_TOKEN, Setup, problem_of
from .records import Records
from .rehearsal import in_interpreter

ROUNDS = 30


def config_of(case: Case, target: Target) -> Config:
    """The picker's choice; experts cannot be split, because their numbers of tokens are known on the device only."""
    return pick(problem_of(case), target, case.form != "experts")


def tiles_of(case: Case, config: Config) -> int:
    """Tiles of the result, times their splits: programs of a launch, which a persistent kernel has fewer of."""
    return tiles(config, problem_of(case)) * config.splits


def least(case: Case, target: Target) -> float:
    """Microseconds of the roofline; the experts read tokens of their own each."""
    if case.form != "experts":
        return roofline(problem_of(case), target).microseconds
    one = Problem(problem_of(case).tokens, case.rows[0], case.cols)
    return roofline(one, target).microseconds * case.experts


def prediction(case: Case, target: Target) -> dict[str, Any]:
    """Modelled microseconds of Triton, of PyTorch and of the roofline.

    ``auto`` compares with what it would run otherwise; of experts that is a product each, not ``torch._grouped_mm``.
    """
    problem, config, bound = problem_of(case), config_of(case, target), least(case, target)
    ours = predict(config, problem, target)
    mine = ours.microseconds
    if case.form == "group":
        theirs = min(one_by_one(problem, target), by_one_product(problem, target))
    elif case.form == "experts":
        mine, theirs = max(mine, bound / 0.85 + 4.0), bound / 0.9 + 4.0
    else:
        theirs = predict_torch(problem, target).microseconds
    if case.form in ("group", "experts"):
        auto = choose_group(problem, target, split=case.form == "group")
    else:
        auto = choose(problem, target)
    return {
        "config": asdict(config),
        "bound": ours.bound,
        "triton_us": round(mine, 2),
        "torch_us": round(theirs, 2),
        "roofline_us": round(bound, 2),
        "auto": "torch" if auto is None else "triton",
    }


def tried(case: Case, target: Target, count: int) -> list[Config]:
    """The legal configurations that the model finds most promising."""
    problem = problem_of(case)
    legal = [c for c in candidates(problem, target) if case.form != "experts" or c.splits == 1]
    legal.sort(key=lambda c: predict(c, problem, target).microseconds)
    return legal[:count]


def measure(case: Case, target: Target, clock: Clock, tune: int, rounds: int) -> dict[str, Any]:
    """One case on a device: `tune` configurations of ours, `backend="auto"`, and PyTorch's forms, by turns.

    Raises CheckFailed where a result of ours is less accurate than PyTorch's: it gets no figure.
    """
    setup = Setup(case, clock.device)
    configs = tried(case, target, tune)
    runs: dict[str, Run] = {"auto": lambda: setup.chunkft("auto")}
    runs |= {str(i): (lambda c=c: setup.chunkft("triton", c)) for i, c in enumerate(configs)}
    for name, run in runs.items():
        if reason := setup.check(run):
            raise CheckFailed(f"{configs[int(name)] if name.isdigit() else name}: {reason}")
    if case.form == "experts":  # what `auto` runs without a table waits for the device, which no graph can
        runs["fallback"] = lambda: setup.chunkft("torch")
    theirs = setup.torch()
    runs |= {f"torch {name}": run for name, run in theirs.items()}
    eager = dict(zip(runs, clock.microseconds(list(runs.values()), rounds), strict=True))
    best = min(range(len(configs)), key=lambda i: eager[str(i)])
    waits = {"auto", "fallback"} if case.form == "experts" else set()
    graphed = [name for name in runs if not name.isdigit() and name not in waits]
    graphs = clock.microseconds([clock.graph(runs[name]) for name in (*graphed, str(best))], rounds)
    alone = dict(zip((*graphed, "triton"), graphs, strict=True))
    alone.setdefault("auto", eager["auto"])
    fastest = min(theirs, key=lambda name: alone[f"torch {name}"])
    base = alone[f"torch {fastest}"]
    each = case.tokens * EXPERTS_A_TOKEN if case.form == "experts" else case.tokens
    flop = 2.0 * each * sum(case.rows) * case.cols
    written = sum(out.numel() * out.element_size() for out in setup.ours) * (2 if setup.accumulate else 1)
    moved = 2.0 * each * (sum(case.rows) + case.cols) + written
    return {
        "config": asdict(configs[best]),
        "triton_us": round(alone["triton"], 2),
        "torch_us": round(base, 2),
        "torch_form": fastest,
        "auto_us": round(alone["auto"], 2),
        "eager_us": {name: round(us, 2) for name, us in eager.items() if not name.isdigit()}
        | {"triton": round(eager[str(best)], 2)},
        "tried": [{"config": asdict(c), "us": round(eager[str(i)], 2)} for i, c in enumerate(configs)],
        "roofline_us": round(least(case, target), 2),
        "tflops": round(flop / alone["triton"] / 1e6, 1),
        "gbytes_per_s": round(moved / alone["triton"] / 1e3, 1),
        "speedup": round(base / alone["triton"], 3),
        "gain_of_auto": math.floor(1000 * eager["fallback"] / eager[str(best)]) / 1000
        if "fallback" in eager
        else math.floor(1000 * base / alone["triton"]) / 1000,
        "auto_speedup": round(base / alone["auto"], 3),
    }


def compile_only(case: Case, target: Target, device: torch.device, tune: int) -> None:
    """Launches what `measure` would, once, so that Triton's cache holds it; several processes can share the work."""
    setup = Setup(case, device)
    setup.chunkft("auto")
    for config in tried(case, target, tune):
        setup.chunkft("triton", config)


def line(case: Case, found: dict[str, Any], predicted: bool) -> str:
    """One line a case."""
    if "error" in found:
        return f"{case.title}  NO FIGURE: {found['error']}"
    c = found["config"]
    tile = f"{c['block_m']}x{c['block_n']}x{c['block_k']} s{c['splits']}{' tma' if c['tma'] else ''}"
    share = found["roofline_us"] / found["triton_us"]
    text = f"{case.title}  {found['triton_us']:9.1f} us  {share:4.0%} of roofline  {tile:20s}"
    text += f"  {found['torch_us'] / found['triton_us']:5.2f}x of PyTorch's {found['torch_us']:.1f} us"
    if predicted:
        return f"{text}  auto: {found['auto']}  (predicted)"
    return f"{text}  {found['tflops']:.0f} TFLOP/s  {found['gbytes_per_s']:.0f} GB/s"


def geometric_means(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By form: geometric mean and minimum of PyTorch's time over Triton's."""
    means = {}
    for form in FORMS:
        ratios = [r["torch_us"] / r["triton_us"] for r in records if r["form"] == form and "error" not in r]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            means[form] = {"mean": round(mean, 3), "least": round(min(ratios), 3), "cases": len(ratios)}
    return means


def write_table(path: Path, records: Sequence[dict[str, Any]], head: dict[str, Any], family: int) -> None:
    """The table that `backend="auto"` reads, from measured records of one device of a family (90 is 9.0)."""
    content = {"format": measured.FORMAT, "family": family}
    content |= {key: head[key] for key in ("device", "versions", "commit", "time")}
    common.write_json(path, {**content, "entries": table_entries(records)})


def write_table_of(suite: dict[str, Any], path: Path) -> None:
    """The same from the results of a suite."""
    facts = suite["cases"]["contact/machine"]["result"]["found"]["facts"]
    capability = facts["gpus"][0]["compute_capability"]
    records = [record for row in suite["cases"].values() for record in records_of(row)]
    write_table(path, records, suite | {"device": suite["gpu"]}, int(capability.replace(".", "")))


def table_entries(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a table: what Triton wins in each measured case over what `auto` would run otherwise."""
    fields = {f.name for f in dataclasses.fields(Case)}
    found = []
    for record in records:
        if "gain_of_auto" not in record:
            continue
        values = {name: record[name] for name in fields}
        values["weights"] = tuple(tuple(pair) for pair in values["weights"])
        values["rows"] = tuple(values["rows"])
        config = Config(**record["config"])
        found.append(measured.entry(problem_of(Case(**values)), config, record["gain_of_auto"]))
    return found


def selected(options: argparse.Namespace) -> list[Case]:
    """The cases that the options name; of a share `i/n`, every n-th; of `--worst`, the slowest of a suite's results."""
    chosen = list(
        cases(tuple(options.models), tuple(options.chunks), tuple(options.tokens), tuple(options.forms))
    )
    if options.worst:
        chosen = worst(options.worst, options.suite, chosen)
    if options.share:
        index, count = map(int, options.share.split("/"))
        chosen = chosen[index::count]
    return chosen


def records_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a case of a suite, with their keys."""
    found = (row.get("result") or {}).get("records", {})
    return [{"key": key, **record} for key, record in found.items()]


def worst(count: int, suite: Path, known: Sequence[Case]) -> list[Case]:
    """The cases in which a suite's results are furthest behind PyTorch, worst first."""
    rows = json.loads(suite.read_text())["cases"].values()
    found = [r for row in rows for r in records_of(row) if "auto_speedup" in r]
    found.sort(key=lambda record: record["speedup"])
    by_key = {case.key: case for case in known}
    return [by_key[record["key"]] for record in found if record["key"] in by_key][:count]


def measure_all(chosen: Sequence[Case], options: argparse.Namespace, out: Path) -> dict[str, dict[str, Any]]:
    """Measures the cases on this machine's GPU, or rehearses them on the CPU; the file grows case by case."""
    device = torch.device("cpu" if options.rehearse else "cuda")
    target = triton_wgrad.target_for(device)
    if options.compile_only:
        for case in chosen:
            compile_only(small(case) if options.rehearse else case, target, device, options.tune)
            print(f"compiled {case.key}", flush=True)
        return {}
    clock = Clock(device, target.l2)
    kind = "rehearsed" if options.rehearse else "measured"
    records = Records(out, {**common.header(options.seed), "kind": kind}, resume=options.resume)
    for case in chosen:
        if case.key in records:
            continue
        with contextlib.suppress(CheckFailed), records.case(case.key) as record:
            run = small(case) if options.rehearse else case
            record |= {**asdict(run), "gpu": target.name}
            record |= measure(run, target, clock, options.tune, options.rounds)
        error = record.get("error")
        shown = f"{case.title}  {error or 'rehearsed'}" if options.rehearse else line(case, record, False)
        print(shown, flush=True)
    return dict(records)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--chunks", nargs="+", type=int, default=list(CHUNKS))
    add("--tokens", nargs="+", type=int, default=list(TOKENS))
    add("--predict", nargs="+", choices=list(TARGETS), help="predict for these GPUs; measure nothing")
    add("--tune", type=int, default=2, help="configurations to try of each case (default 2)")
    add("--rounds", type=int, default=ROUNDS)
    add("--seed", type=int, default=0)
    add("--share", metavar="I/N", help="every N-th case from the I-th, counted from 0")
    add(
        "--worst",
        type=int,
        metavar="N",
        help="the N cases in which the results of --suite are furthest behind",
    )
    add("--suite", type=Path, help="results of bench.gpu_suite, for --worst")
    add("--compile-only", action="store_true", help="launch every configuration once and measure nothing")
    add("--resume", action="store_true", help="keep what --out holds and go on behind it")
    add(
        "--rehearse",
        action="store_true",
        help="small, on the CPU, kernels in the interpreter: figures mean nothing",
    )
    add("--out", type=Path, help="JSON (default bench/results/kernels-measured or -predicted.json)")
    add("--table", type=Path, help="also write a table for backend='auto' (measured only)")
    options = parser.parse_args(arguments)
    if options.share and not re.fullmatch(r"\d+/[1-9]\d*", options.share):
        parser.error(f"--share {options.share} is not allowed; needs I/N, such as 0/8")
    if (options.worst is None) != (options.suite is None):
        parser.error("--worst and --suite need each other")
    options.measuring = options.rehearse or (torch.cuda.is_available() and not options.predict)
    if options.table and (not options.measuring or options.rehearse):
        parser.error("--table needs measurements: a CUDA device, and no --predict")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the command line."""
    options = parse(arguments)
    if options.rehearse:
        in_interpreter("kernels", arguments)
    torch.manual_seed(options.seed)
    chosen = selected(options)
    if not chosen:
        raise SystemExit("no case is chosen" + (f": {options.suite} has no results" if options.suite else ""))
    out = options.out or common.RESULTS / f"kernels-{'measured' if options.measuring else 'predicted'}.json"
    if options.measuring:
        records = measure_all(chosen, options, out)
        if options.compile_only:
            return
        if options.table:
            major, minor = torch.cuda.get_device_capability()
            family = 10 * major + minor
            write_table(options.table, list(records.values()), common.header(options.seed), family)
    else:
        print("Predictions of the picker's model. Nothing here was measured.")
        records = {}
        for name in options.predict or ["a100", "rtx4090", "h100", "b200"]:
            print(f"--- {name}")
            for case in chosen:
                values = prediction(case, TARGETS[name])
                records[f"{name}/{case.key}"] = {**asdict(case), "gpu": name, **values}
                print(line(case, values, predicted=True))
    result = json.loads(out.read_text()) if options.measuring else common.header(options.seed)
    result |= {"kind": result.get("kind", "predicted")}
    result["geometric_means"] = {
        name: geometric_means([r for r in records.values() if r.get("gpu") == name])
        for name in {r["gpu"]: None for r in records.values() if "gpu" in r}
    }
    result["records"] = records
    common.write_json(out, result)
    for name, means in result["geometric_means"].items():
        print(name, means)
    print(f"{out}: {len(records)} cases, {result['kind']}")
    if any("error" in record for record in records.values()):
        print("some cases have no figure: see the lines that say why", file=sys.stderr)
        raise SystemExit(common.INCOMPLETE)


if __name__ == "__main__":
    main()
