"""What training on many ranks sends, holds and takes by the arithmetic of bench.scale_model and bench.scale_time.

python -m bench.scale_table         8B, 70B and 405B on 1 to 1,024 ranks, into bench/results/scale-predicted.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import common
from .doc_tables import markdown
from .scale_model import METHODS, SHAPES, Memory, Setting, memory, own_bound, traffic
from .scale_time import CLUSTERS, finest, fixed_batch, message_bytes, seconds

OUT = common.RESULTS / "scale-predicted.json"
RANKS = tuple(2**power for power in range(11))
BATCHES = (1 << 22, 1 << 20, 1 << 18)  # tokens a step, of all ranks together
SHOWN = (2, 8, 64, 1024)
ROWS = 64  # a piece of fewer rows is slow to compute
NAMES = {
    "replicas": "chunkft, replicas",
    "fsdp2": "chunkft, FSDP2",
    "hybrid": "chunkft, shards of 8",
    "ddp": "DDP, AdamW",
    "zero1": "ZeRO-1, AdamW",
    "zero3": "ZeRO-3 or FSDP2, AdamW",
    "badam": "ZeRO-3, BAdam",
}
GIB = 2**30


def case(setting: Setting) -> dict[str, Any]:
    """Bytes, memory, and seconds at the setting's own tokens and at fixed batches."""
    sent, held = traffic(setting), memory(setting)
    found: dict[str, Any] = {
        "model": setting.shape.name,
        "method": setting.method,
        "ranks": setting.ranks,
        "chunks": len(setting.sweep),
        "tokens": setting.tokens,
        "sent": _rounded(asdict(sent) | {"own": sent.own, "total": sent.total}),
        "held": _rounded(asdict(held) | {"device": held.device}),
        "message": round(message_bytes(setting)),
        "seconds": {},
    }
    if setting.method in ("replicas", "fsdp2"):
        found["of_bound"] = round(sent.own / own_bound(setting), 5)
        interleaved = replace(setting, interleaved=True)
        found["of_bound_interleaved"] = round(traffic(interleaved).own / own_bound(setting), 5)
        found["most_chunks"] = finest(setting)
        found["most_chunks_interleaved"] = finest(interleaved)
        found["most_chunks_interleaved_64"] = finest(interleaved, ROWS)
    for name, cluster in CLUSTERS.items():
        found["seconds"][name] = {}
        for batch in (None, *BATCHES):
            step = seconds(setting if batch is None else fixed_batch(setting, batch), cluster)
            found["seconds"][name][str(batch or "own")] = {
                "step": _digits(step.step),
                "compute": _digits(step.compute),
                "gathers": _digits(step.gather_forward + step.gather_backward),
                "gradients": _digits(step.gradients),
                "latency": _digits(step.latency),
                "weights": _digits(step.weights),
                "host": _digits(step.host),
                "bound": step.bound,
            }
    return found


def _rounded(values: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in values.items()}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def cases(shapes: Sequence[str], ranks: Sequence[int], chunks: int, tokens: int) -> list[dict[str, Any]]:
    """Every method of every shape on every number of ranks; hybrid shards from two copies on."""
    return [
        case(Setting(SHAPES[name], method, number, chunks, tokens))
        for name in shapes
        for method in METHODS
        for number in ranks
        if method != "hybrid" or number > 8
    ]


def two_cards(chunks: int = 128, tokens: int = 1024) -> dict[str, Any]:
    """70B in 16 bit on two cards, with FSDP2 and state that streams; embedding and head in the outer group, or not."""
    base = Setting(SHAPES["70B"], "fsdp2", 2, chunks, tokens, streamed=True)
    found: dict[str, Any] = {
        "chunks": chunks,
        "tokens": tokens,
        "parameters": base.shape.numel,
        "block": base.element * base.shape.block_numel,
        "tables": base.element * (base.shape.rest[0].numel + base.shape.rest[-1].numel),
    }
    for name, setting in (("together", base), ("apart", replace(base, apart=True))):
        held: Memory = memory(setting)
        found[name] = _rounded(asdict(held) | {"device": held.device})
    return found


def bytes_table(result: dict[str, Any]) -> str:
    """GB that a rank sends in a step: what is the method's own, and what the gathers of sharding add."""
    body = []
    for model in result["models"]:
        for method in METHODS:
            rows = _by_ranks(result, model, method)
            body.append([model, NAMES[method], *(_sent(rows.get(ranks)) for ranks in SHOWN)])
    return markdown(("model", "method", *(f"{ranks:,} ranks" for ranks in SHOWN)), body)


def _sent(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    sent = row["sent"]
    text = f"{sent['own'] / 1e9:.2f}" if sent["own"] < 1e10 else f"{sent['own'] / 1e9:,.0f}"
    return text + (f" + {sent['gathers'] / 1e9:,.0f}" if sent["gathers"] else "")


def memory_table(result: dict[str, Any]) -> str:
    """GiB on the device of a rank."""
    body = []
    for model in result["models"]:
        for method in METHODS:
            rows = _by_ranks(result, model, method)
            body.append([model, NAMES[method], *(_held(rows.get(ranks)) for ranks in (1, *SHOWN))])
    return markdown(("model", "method", "1 rank", *(f"{ranks:,} ranks" for ranks in SHOWN)), body)


def _held(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    size = row["held"]["device"] / GIB
    text = f"{size:.1f}" if size < 100 else f"{size:,.0f}"
    return f"**{text}**" if size < 79 else text  # what a card of 80 GiB has for it


def step_table(result: dict[str, Any]) -> str:
    """Seconds of a step of a fixed batch on each cluster, and what takes most of them."""
    body = []
    shown = [("8B", "replicas"), ("8B", "ddp"), *(("70B", m) for m in ("fsdp2", "hybrid", "zero3"))]
    for name in CLUSTERS:
        for model, method in shown:
            if model not in result["models"]:
                continue
            rows = _by_ranks(result, model, method)
            for batch in BATCHES[1:]:
                cells = [_step(rows.get(ranks), name, batch) for ranks in (8, 64, 256, 1024)]
                body.append([name, model, NAMES[method], f"{batch:,}", *cells])
    head = (
        "cluster",
        "model",
        "method",
        "tokens a step",
        *(f"{ranks:,} ranks" for ranks in (8, 64, 256, 1024)),
    )
    return markdown(head, body)


def _step(row: dict[str, Any] | None, cluster: str, batch: int) -> str:
    if row is None:
        return "-"
    step = row["seconds"][cluster][str(batch)]
    return f"{step['step']:.3g}, {step['bound']}"


def limits_table(result: dict[str, Any]) -> str:
    """What becomes small or large with the number of ranks, for chunks on shards and on replicas."""
    body = []
    for model in result["models"]:
        shards, replicas = (_by_ranks(result, model, method) for method in ("fsdp2", "replicas"))
        for ranks in SHOWN:
            row, other = shards[ranks], replicas[ranks]
            body.append(
                [
                    model,
                    f"{ranks:,}",
                    f"{row['message'] / 2**10:,.0f}",
                    f"{row['most_chunks']:,}",
                    f"{row['most_chunks_interleaved']:,}",
                    f"{row['most_chunks_interleaved_64']:,}",
                    f"{other['of_bound']:.3f}",
                    f"{other['of_bound_interleaved']:.3f}",
                ]
            )
    head = (
        *("model", "ranks", "KiB a message", "most chunks, windows", "most chunks, interleaved"),
        *("the same with 64 rows a piece", "replicas: sent / (4N/K)", "the same, interleaved"),
    )
    return markdown(head, body)


def cards_table(result: dict[str, Any]) -> str:
    """70B on two cards, by what is held."""
    two = result["two_cards"]
    names = {
        "weights": "shard",
        "gathered": "gathered weights",
        "gradients": "gradients",
        "buffers": "on its way",
        "state": "pages of state",
        "activations": "activations",
        "device": "together",
        "host": "in host memory",
    }
    body = [
        [label, *(f"{two[how][name] / GIB:.1f}" for how in ("together", "apart"))]
        for name, label in names.items()
    ]
    return markdown(("GiB a rank", "one outer group", "embedding and head apart"), body)


def _by_ranks(result: dict[str, Any], model: str, method: str) -> dict[int, dict[str, Any]]:
    rows = (row for row in result["cases"] if (row["model"], row["method"]) == (model, method))
    return {row["ranks"]: row for row in rows}


def line_of(row: dict[str, Any]) -> str:
    """One case in one line."""
    sent, held = row["sent"], row["held"]
    step = row["seconds"]["fast"]["own"]
    return (
        f"{row['model']:>5s} {NAMES[row['method']]:24s} {row['ranks']:5d} ranks: sent {sent['own'] / 1e9:8.2f} GB + "
        f"{sent['gathers'] / 1e9:7.1f} gathered, device {held['device'] / GIB:7.1f} GiB, "
        f"step {step['step']:.3g} s, bound by {step['bound']}"
    )


def write(path: Path, header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The result with one line a case."""
    common.write_json(path, {**header, "cases": None})
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(path.read_text().replace('"cases": null', f'"cases": [\n{lines}\n ]'))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scale_table", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--chunks", type=int, default=32, help="K (default 32)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank in a step (default 4096)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    found = cases(args.models, args.ranks, args.chunks, args.tokens)
    for row in found:
        print(line_of(row))
    given = {
        "kind": "predicted",
        "models": args.models,
        "chunks": args.chunks,
        "tokens": args.tokens,
        "clusters": {name: asdict(cluster) for name, cluster in CLUSTERS.items()},
        "two_cards": two_cards(),
    }
    write(args.out, {**common.header(0), **given}, found)
    print(args.out)


if __name__ == "__main__":
    main()
