"""Other methods side by side: peak memory in a fresh process, step time interleaved, loss after equal steps.

python -m bench.peer_bench                 3M parameters on a CPU in some ten minutes, 1B on a GPU
python -m bench.peer_bench --only chunkft LoRA --rates 1e-3

Each method runs in a process of its own first: there its training is checked (losses finite and falling; chunkft's
first step the same as AdamW's on the weights that it trains), its peak memory taken, and its loss found at each
learning rate. Then all that passed take steps by turns in one process. A method that is not installed, needs a GPU,
fails, or fails its check is a row with the error and without numbers.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import common, harness, plain_llama
from .memory import CHILD_ENV, peak_rss
from .peer_methods import METHODS, Advance

SUCCESSORS = 4
LAST = 5  # steps whose mean loss is the final loss
MODULES = {"galore-torch": "galore_torch", "apollo-torch": "apollo_torch", "adam-mini": "adam_mini"} | {
    "lomo-optim": "lomo_optim"
}


class Text:
    """Random sequences in which each token has four possible successors: cross entropy can fall to log 4."""

    def __init__(self, vocab: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.next = torch.randint(0, vocab, (vocab, SUCCESSORS), generator=self.generator)

    def batch(self, batch: int, tokens: int) -> Tensor:
        """Token ids (batch, tokens + 1), int64."""
        ids = torch.randint(0, len(self.next), (batch, 1), generator=self.generator)
        choices = torch.randint(0, SUCCESSORS, (batch, tokens), generator=self.generator)
        columns = [ids[:, 0]]
        for t in range(tokens):
            columns.append(self.next[columns[-1], choices[:, t]])
        return torch.stack(columns, dim=1)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(name: str, model: str, lr: float) -> tuple[plain_llama.PlainLlama, Advance]:
    """A model with the weights of seed 0 and a step of the method; bf16 on a GPU, with recomputed blocks."""
    gpu = device().type == "cuda"
    net = plain_llama.build(model, device(), torch.bfloat16 if gpu else torch.float32, checkpointing=gpu)
    return net, METHODS[name].make(net, lr)


def missing(name: str) -> str | None:
    """Why this machine cannot run the method; None where it can be tried."""
    method = METHODS[name]
    if method.package is not None:
        module = MODULES.get(method.package, method.package)
        if importlib.util.find_spec(module) is None:
            return f"not installed: pip install {method.package}"
    return "needs a GPU" if method.gpu and device().type != "cuda" else None


def wrong(name: str, losses: Sequence[float]) -> str | None:
    """What is wrong with the training: losses that are not finite or do not fall."""
    if not all(math.isfinite(value) for value in losses):
        return "check failed: the loss is not finite"
    start, end = losses[0], statistics.fmean(losses[-LAST:])
    if end >= start:
        return f"check failed: the loss did not fall ({start:.3f} to {end:.3f})"
    return None


def differs_from_adamw(name: str, model: str, ids: Tensor) -> str | None:
    """chunkft's first step against AdamW's: what it trains must be equal, what it does not train unchanged.

    One step changes whatever a chunk trains, and each element of AdamW's first step depends on its gradient alone.
    """
    lr = 1e-3
    start = {
        k: v.detach().clone() for k, v in plain_llama.build(model, device(), torch.float32).named_parameters()
    }
    weights = {}
    for other in ("AdamW", name):
        net = plain_llama.build(model, device(), torch.float32)
        METHODS[other].make(net, lr)(ids)
        weights[other] = {k: v.detach() for k, v in net.named_parameters()}
    trained = same = 0
    for key, before in start.items():
        ours, theirs = weights[name][key], weights["AdamW"][key]
        moved = ours != before
        trained += int(moved.sum())
        # An element whose gradient is as small as rounding may go either way: Adam's first step is its sign.
        same += int(torch.isclose(ours, theirs, atol=lr / 20, rtol=0)[moved].sum())
    if not trained or same < 0.999 * trained:
        return f"check failed: of {trained} weights that it trained, {same} are those of AdamW"
    return None


def child(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Checks, peak bytes and losses of one method in this process."""
    text = Text(plain_llama.SHAPES[args.model].vocab)
    batches = [text.batch(args.batch, args.tokens).to(device()) for _ in range(args.steps)]
    result: dict[str, Any] = {"final_loss_by_rate": {}}
    # Libraries and work space of a first step are no part of what training this model takes.
    first = Text(plain_llama.SHAPES["tiny"].vocab).batch(2, 16).to(device())
    _, advance = build(name, "tiny", args.rates[0])
    for _ in range(2):
        advance(first)
    del advance
    for number, lr in enumerate(args.rates):
        gc.collect()
        start = _reset_peak() if number == 0 else 0
        _, advance = build(name, args.model, lr)
        losses = [float(advance(ids)) for ids in batches]
        if number == 0:
            result["training_bytes"] = _peak() - start
            result["first_loss"] = losses[0]
        if problem := wrong(name, losses):
            result.setdefault("failed_rates", {})[f"{lr:g}"] = problem
            continue
        result["final_loss_by_rate"][f"{lr:g}"] = statistics.fmean(losses[-LAST:])
    if not result["final_loss_by_rate"]:
        return {"error": next(iter(result["failed_rates"].values()))}
    if name.startswith("chunkft") and (problem := differs_from_adamw(name, args.model, batches[0])):
        return {"error": problem}
    rate = min(result["final_loss_by_rate"], key=result["final_loss_by_rate"].__getitem__)
    return result | {"final_loss": result["final_loss_by_rate"][rate], "rate": float(rate)}


def _reset_peak() -> int:
    """Forgets the peak so far and returns what is held now, in bytes."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else peak_rss()


def in_fresh_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """`child` in a process of its own; an error where it fails or takes more than `args.limit` seconds."""
    command = [sys.executable, "-m", f"{common.PACKAGE}.peer_bench", "--child", name, "--model", args.model]
    for option in ("batch", "tokens", "steps", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    command += ["--rates", *(str(rate) for rate in args.rates)]
    try:
        done = subprocess.run(
            command,
            cwd=common.REPO,
            env=os.environ | CHILD_ENV,
            capture_output=True,
            text=True,
            timeout=args.limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {args.limit:g} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"error": said[-1][:300] if said else f"ended with status {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def step_times(names: Sequence[str], args: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Samples of all methods by turns in this process; one that cannot be built beside the others gets an error."""
    ids = Text(plain_llama.SHAPES[args.model].vocab).batch(args.batch, args.tokens).to(device())
    runs: dict[str, Any] = {}
    errors = {}
    for name in names:
        try:
            advance = build(name, args.model, rates[name])[1]
            for _ in range(args.per_sample):  # a sweep, in which every slot of state is made
                advance(ids)
            runs[name] = lambda advance=advance: (advance(ids), _settle())
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        _free()
    clock = time.perf_counter if device().type == "cuda" else time.process_time
    found = harness.measure(runs, {}, args.rounds, clock, warmup=0, per_call=args.per_sample) if runs else {}
    return found | {
        "errors": errors,
        "clock": "wall" if device().type == "cuda" else "cpu time of the process",
    }


def _settle() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def measure(
    names: Sequence[str], args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Rows of all methods, and the noise of the interleaved run; `keep` gets what is known after each method."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        problem = missing(name)
        rows[name] = {"settings": METHODS[name].settings}
        rows[name] |= {"error": problem} if problem else in_fresh_process(name, args)
        print(f"{name:22s} " + (rows[name].get("error") or _short(rows[name])), flush=True)
        keep({"noise": None, "clock": None, "methods": rows})
    sound = [name for name, row in rows.items() if "error" not in row]
    times = step_times(sound, args, {name: rows[name]["rate"] for name in sound})
    for name in sound:
        if name in times["errors"]:
            rows[name]["step_error"] = times["errors"][name]
        else:
            rows[name] |= times["variants"][name]
            rows[name]["tokens_per_s"] = 1e3 * args.batch * args.tokens / rows[name]["median_ms"]
    return {"noise": times.get("noise"), "clock": times["clock"], "methods": rows}


def _short(row: dict[str, Any]) -> str:
    return (
        f"training {row['training_bytes'] / 2**20:.1f} MiB, loss {row['first_loss']:.3f} to {row['final_loss']:.3f}"
        f" at lr {row['rate']:g}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.peer_bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help="methods, by the beginning of their name")
    add("--model", choices=plain_llama.SHAPES, default="1B" if gpu else "3M")
    add("--batch", type=int, default=4)
    add("--tokens", type=int, default=1024 if gpu else 64)
    add("--steps", type=int, default=20 if gpu else 40, help="of training, for loss and peak (default 40)")
    add(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-4] if gpu else [1e-3, 3e-3, 1e-2],
        help="learning rates",
    )
    add("--rounds", type=int, default=5, help="timed rounds (default 5)")
    add("--per-sample", type=int, default=16, help="steps a sample, whole sweeps of K=16 (default 16)")
    add("--threads", type=int, default=1)
    add("--limit", type=float, default=240.0, help="seconds for a method (default 240)")
    add("--child", help=argparse.SUPPRESS)
    add("--out", type=Path, default=common.RESULTS / f"peers-{'gpu' if gpu else 'cpu'}.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(child(args.child, args)))
        return
    names = [n for n in METHODS if not args.only or any(n.lower().startswith(w.lower()) for w in args.only)]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: allowed are beginnings of {', '.join(METHODS)}")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "child")}
    head = common.header(0) | {"settings": settings}
    result = measure(names, args, lambda known: common.write_json(args.out, head | known))
    common.write_json(args.out, head | result)
    if result["noise"] is not None:
        print(harness.noise_line(result["noise"]))
    for name, row in result["methods"].items():
        if "median_ms" in row:
            base = harness.Interval(**row["over_base"])
            print(f"{name:22s} {row['median_ms']:8.2f} ms a step, {base} x {names[0]}, {_short(row)}")


if __name__ == "__main__":
    main()
