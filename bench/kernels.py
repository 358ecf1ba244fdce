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
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft.kernels import Blocks, expert_wgrad, grouped_wgrad, measured, wgrad
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
from .kernel_cases import CHUNKS, EXPERTS, EXPERTS_A_TOKEN, FORMS, MODELS, TOKENS, Case, cases

Run = Callable[[], Any]
ROUNDS = 30
SAMPLE = 64


def problem_of(case: Case) -> Problem:
    """What the picker is asked for a case; groups and experts are read through pointers."""
    if case.form == "group":
        return Problem(case.tokens, sum(case.rows), case.cols, described=False, parts=case.rows, shared=True)
    if case.form == "experts":
        each = -(-case.tokens * EXPERTS_A_TOKEN // EXPERTS)
        parts = case.rows * EXPERTS
        return Problem(each, sum(parts), case.cols, described=False, parts=parts)
    block = 64 if case.form == "blocks" else 0
    return Problem(case.tokens, case.rows[0], case.cols, row_block=block, row_shift=case.start % 8)


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
    return roofline(one, target).microseconds * EXPERTS


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


class Setup:
    """Operands of a case on a device, and the calls that are compared; every call overwrites its own results."""

    def __init__(
        self,
        case: Case,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        values: Callable[..., Tensor] = torch.randn,
    ) -> None:
        self.case = case
        tokens = case.tokens * (EXPERTS_A_TOKEN if case.form == "experts" else 1)
        self.dys = [values(tokens, rows, device=device, dtype=dtype) for rows, _ in case.weights]
        self.x = values(tokens, case.cols, device=device, dtype=dtype)
        self.spans = [slice(case.start, case.start + rows) for rows in case.rows]
        shapes = [(rows, case.cols) for rows in case.rows]
        if case.form == "experts":
            ends = torch.randint(0, tokens + 1, (EXPERTS - 1,)).sort().values.tolist()
            self.offsets = torch.tensor([*ends, tokens], dtype=torch.int32, device=device)
            shapes = [(EXPERTS, *shapes[0])]
        if case.form == "blocks":
            blocks = torch.randperm(case.weights[0][0] // 64)[: case.rows[0] // 64]
            self.blocks = Blocks(blocks.to(device), 64)
        self.ours = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        # results of PyTorch lie one after another, so that one product can write all of a group
        if case.form == "group":
            self.whole = torch.empty(sum(case.rows), case.cols, dtype=dtype, device=device)
            self.theirs = list(self.whole.split(case.rows))
        else:
            self.theirs = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]

    def triton(self, config: Config) -> None:
        """The kernel in one configuration."""
        case, dy = self.case, self.dys[0]
        if case.form == "group":
            grouped_wgrad(self.dys, self.x, self.spans, outs=self.ours, backend="triton", config=config)
        elif case.form == "experts":
            rows = self.spans[0]
            expert_wgrad(
                dy, self.x, self.offsets, rows=rows, out=self.ours[0], backend="triton", config=config
            )
        else:
            rows_of = self.blocks if case.form == "blocks" else self.spans[0]
            wgrad(dy, self.x, rows_of, out=self.ours[0], backend="triton", config=config)

    def torch_forms(self) -> list[Run]:
        """All that PyTorch offers for the same result; the fastest is what the kernel is held against."""
        case, dy = self.case, self.dys[0]
        if case.form == "experts":
            return [self._grouped_mm]
        if case.form == "blocks":
            return [lambda: wgrad(dy, self.x, self.blocks, out=self.theirs[0], backend="torch")]
        if case.form == "group":
            return [self._joined, self._one_by_one]
        return [self._one_by_one]

    def torch(self) -> None:
        """The first of PyTorch's forms."""
        self.torch_forms()[0]()

    def fallback(self) -> None:
        """What `backend="auto"` runs where it does not take the kernel."""
        if self.case.form != "experts":
            self.torch()
            return
        expert_wgrad(
            self.dys[0], self.x, self.offsets, rows=self.spans[0], out=self.theirs[0], backend="torch"
        )

    def _grouped_mm(self) -> None:
        self.theirs[0] = torch._grouped_mm(self.dys[0][:, self.spans[0]].t(), self.x, offs=self.offsets)

    def _one_by_one(self) -> None:
        for member, span, out in zip(self.dys, self.spans, self.theirs, strict=True):
            torch.mm(member[:, span].t(), self.x, out=out)

    def _joined(self) -> None:
        joined = torch.cat([dy[:, span] for dy, span in zip(self.dys, self.spans, strict=True)], 1)
        torch.mm(joined.t(), self.x, out=self.whole)

    def exact(self, result: int) -> tuple[Tensor, tuple[Any, ...]]:
        """fp64 values of a sample of a result, and where they are in it."""
        rows = torch.randint(0, self.case.rows[result], (SAMPLE,))
        cols = torch.randint(0, self.case.cols, (SAMPLE,))
        x, dy = self.x[:, cols].double(), self.dys[result]
        if self.case.form == "experts":
            expert = int(torch.randint(0, EXPERTS, ()))
            ends = [0, *self.offsets.tolist()]
            tokens = slice(ends[expert], ends[expert + 1])
            source = dy[tokens][:, rows + self.spans[0].start].double()
            return source.t() @ x[tokens], (expert, rows[:, None], cols[None, :])
        if self.case.form == "blocks":
            index = self.blocks.index.cpu()
            source = dy[:, index[rows // 64] * 64 + rows % 64].double()
        else:
            source = dy[:, rows + self.spans[result].start].double()
        return source.t() @ x, (rows[:, None], cols[None, :])

    def check(self, config: Config) -> str:
        """Why the kernel's result may not be timed; empty if it is as accurate as PyTorch's."""
        for out in self.ours:
            out.fill_(float("nan"))
        self.triton(config)
        self.torch()
        for i, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            exact, place = self.exact(i)
            off = float((ours[place].double() - exact).abs().max())
            allowed = 2 * float((theirs[place].double() - exact).abs().max()) + 1e-6 * (
                1 + float(exact.abs().max())
            )
            if not off <= allowed:
                return f"off by {off:.3g}, allowed {allowed:.3g}"
        return ""


def timed(runs: Sequence[Run], rounds: int, flush: Tensor) -> list[float]:
    """Median microseconds of each run, taken in turn, L2 written over before each."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 3):
        for run, kept in zip(runs, times, strict=True):
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 3:
                kept.append(begin.elapsed_time(end) * 1e3)
    return [statistics.median(kept) for kept in times]


def in_graph(run: Run) -> Run:
    """The same launches without Python between them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(case: Case, target: Target, flush: Tensor, tune: int, rounds: int) -> dict[str, Any]:
    """One case on this machine's GPU; `tune` configurations, the most promising by the model, are tried."""
    setup = Setup(case, "cuda")
    problem = problem_of(case)
    legal = [c for c in candidates(problem, target) if case.form != "experts" or c.splits == 1]
    legal.sort(key=lambda c: predict(c, problem, target).microseconds)
    tried = legal[:tune]
    for config in tried:
        if reason := setup.check(config):
            return {"error": f"{config}: {reason}"}
    forms = setup.torch_forms()
    runs: list[Run] = [*forms, *(lambda c=c: setup.triton(c) for c in tried)]
    eager = timed(runs, rounds, flush)
    theirs = min(range(len(forms)), key=lambda i: eager[i])
    best = min(range(len(tried)), key=lambda i: eager[len(forms) + i])
    graphs = timed([in_graph(runs[theirs]), in_graph(runs[len(forms) + best])], rounds, flush)
    speedup = graphs[0] / graphs[1]
    if case.form == "experts":
        # the loop waits for the device, which no graph can
        loop, kernel = timed([setup.fallback, runs[len(forms) + best]], rounds, flush)
        gain = loop / kernel
    else:
        gain = speedup
    each = case.tokens * EXPERTS_A_TOKEN if case.form == "experts" else case.tokens
    flop = 2.0 * each * sum(case.rows) * case.cols
    moved = 2.0 * (each * (sum(case.rows) + case.cols) + sum(out.numel() for out in setup.ours))
    return {
        "config": asdict(tried[best]),
        "triton_us": round(graphs[1], 2),
        "torch_us": round(graphs[0], 2),
        "triton_eager_us": round(eager[len(forms) + best], 2),
        "torch_eager_us": round(eager[theirs], 2),
        "roofline_us": round(least(case, target), 2),
        "tflops": round(flop / graphs[1] / 1e6, 1),
        "gbytes_per_s": round(moved / graphs[1] / 1e3, 1),
        "speedup": round(speedup, 3),
        "gain_of_auto": math.floor(gain * 1000) / 1000,
    }


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


def write_table(path: Path, target: Target, chosen: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    """The table that `backend="auto"` reads: what it wins over what it would run otherwise."""
    entries = [
        measured.entry(problem_of(case), Config(**found["config"]), found["gain_of_auto"])
        for case, found in chosen
        if "error" not in found
    ]
    content = {"format": measured.FORMAT, "family": target.capability, "device": common.device_name()}
    common.write_json(path, {**content, "versions": common.versions(), "entries": entries})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument(
        "--predict", nargs="+", choices=list(TARGETS), help="predict for these GPUs; measure nothing"
    )
    parser.add_argument("--tune", type=int, default=1, help="configurations to try of each case (default 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="JSON (default bench/results/kernels-measured or -predicted.json)"
    )
    parser.add_argument("--table", type=Path, help="also write a table for backend='auto' (measured only)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    chosen = list(
        cases(tuple(options.models), tuple(options.chunks), tuple(options.tokens), tuple(options.forms))
    )
    measuring = torch.cuda.is_available() and not options.predict
    if options.table and not measuring:
        parser.error("--table needs measurements: a CUDA device, and no --predict")
    result: dict[str, Any] = {**common.header(options.seed), "kind": "measured" if measuring else "predicted"}
    records: list[dict[str, Any]] = []
    if measuring:
        from chunkft.kernels.triton_wgrad import target_for

        target = target_for(torch.device("cuda"))
        flush = torch.empty(max(256 << 20, 2 * target.l2), dtype=torch.uint8, device="cuda")
        found = []
        for case in chosen:
            found.append((case, measure(case, target, flush, options.tune, options.rounds)))
            print(line(*found[-1], predicted=False), flush=True)
        records = [{**asdict(case), "gpu": target.name, **values} for case, values in found]
        if options.table:
            write_table(options.table, target, found)
    else:
        print("Predictions of the picker's model. Nothing here was measured.")
        for name in options.predict or ["a100", "rtx4090", "h100", "b200"]:
            print(f"--- {name}")
            for case in chosen:
                values = prediction(case, TARGETS[name])
                records.append({**asdict(case), "gpu": name, **values})
                print(line(case, values, predicted=True))
    result["geometric_means"] = {
        gpu: geometric_means([r for r in records if r["gpu"] == gpu])
        for gpu in {r["gpu"]: None for r in records}
    }
    result["cases"] = records
    out = options.out or common.RESULTS / f"kernels-{result['kind']}.json"
    common.write_json(out, result)
    for gpu, means in result["geometric_means"].items():
        print(gpu, means)
    print(f"{out}: {len(records)} cases, {result['kind']}")
    if any("error" in record for record in records):
        raise SystemExit("a kernel was less accurate than PyTorch: see the lines without a figure")


if __name__ == "__main__":
    main()
