"""Training on several processes: bytes sent by kind beside the arithmetic model's, bytes of state, and losses.

python -m bench.scale               2, 4 and 8 gloo processes on this machine, into bench/results/scale-cpu.json
python -m bench.scale --ranks 2 --methods replicas fsdp2

Bytes are counted twice: by what chunkft says of itself (`optimizer.traffic()`), and where torch hands collectives to a
process group (bench.wire). Each has to be within one per cent of bench.scale_model. Losses are those of one process
that sees the joined batches, with the same plan. Times are those of bench.scale_steps, under torchrun.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from . import common, plain_llama, scale_model, scale_setup, wire
from .doc_tables import markdown
from .scale_setup import KINDS, Case

OUT = common.RESULTS / "scale-cpu.json"
TOLERANCE = 0.01
SIZE = plain_llama.Shape(128, 4, 384, 4, 2, 512)
RANKS = (2, 4, 8)
LIMIT = 300  # seconds for all cases of one number of ranks
LOSS = 1e-5  # relative difference of losses in fp32 beyond which they are not the same training


def cases_of(ranks: int, methods: Sequence[str], chunks: Sequence[int]) -> list[Case]:
    """The cases of one number of ranks: fp32 for losses, and 16 bit for what is promised of bytes."""
    found = []
    for method in methods:
        if method == "hybrid" and ranks < 4:
            continue
        if method not in scale_model.CHUNKED:
            found.append(Case(method, ranks))
            continue
        found += [Case(method, ranks, k, steps=max(8, 2 * k)) for k in chunks]
        found.append(Case(method, ranks, max(chunks), "bfloat16", 2 * max(chunks)))
    return found


def run(
    ranks: int, cases: list[Case], size: plain_llama.Shape, limit: float = LIMIT
) -> list[list[dict[str, Any]]]:
    """The records of each case by rank.

    Raises:
        TimeoutError: if the processes are not done in `limit` seconds; they are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (port, ranks, cases, size, folder)
        context = mp.spawn(scale_setup.worker, args=arguments, nprocs=ranks, join=False)
        end = time.monotonic() + limit
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{ranks} processes were not done after {limit:.0f} s")
        by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text())["cases"] for rank in range(ranks)]
    return [list(records) for records in zip(*by_rank, strict=True)]


def judged(case: Case, records: list[dict[str, Any]], size: plain_llama.Shape) -> dict[str, Any]:
    """Counted bytes beside the model's, state beside its share, and losses beside those of one process."""
    setting = scale_model.traffic(scale_setup.setting_of(case, size))
    predicted = {kind: value for kind, value in asdict(setting).items() if value}
    kinds = KINDS[case.method]
    counted: dict[str, float] = {}
    for collective, sent in wire.mean_over_ranks([record["wire"] for record in records]).items():
        kind = kinds.get(collective, "control")
        counted[kind] = counted.get(kind, 0.0) + sent
    said = wire.mean_over_ranks([record["said"] for record in records])
    gaps = {kind: counted.get(kind, 0.0) / value - 1 for kind, value in predicted.items()}
    if said:
        own = {kind: value for kind, value in predicted.items() if kind != "gathers"}
        gaps |= {f"{kind}, said": said.get(kind, 0.0) / value - 1 for kind, value in own.items()}
    states = [record["memory"].get("state_host") or record["memory"]["state_active"] for record in records]
    held = scale_model.memory(scale_setup.setting_of(case, size))
    found = {
        "case": asdict(case),
        "name": case.name,
        "counted": counted,
        "said": said,
        "predicted": predicted,
        "gaps": gaps,
        "most_sent": max(sum(record["wire"].values()) for record in records),
        "state": {"ranks": states, "predicted": _state(case, held)},
    }
    if case.method in ("replicas", "fsdp2"):
        bound = scale_model.own_bound(scale_setup.setting_of(case, size))
        own_bytes = sum(value for kind, value in counted.items() if kind != "gathers")
        found["of_bound"] = own_bytes / bound
    if case.dtype == "float32":
        joined = [sum(values) / len(values) for values in zip(*(r["losses"] for r in records), strict=True)]
        expected = scale_setup.alone(case, size, records[0].get("plan"))
        found["losses"] = {
            "ranks": joined,
            "alone": expected,
            "worst": max(abs(a - b) / b for a, b in zip(joined, expected, strict=True)),
        }
    return found


def _state(case: Case, held: scale_model.Memory) -> float:
    """Bytes of state of a rank: that of all chunks, or of full AdamW without a master, which fp32 weights have not."""
    if case.method in scale_model.CHUNKED:
        return held.host
    return held.state * scale_model.MOMENTS / scale_model.DENSE_STATE


def faults(found: dict[str, Any], tolerance: float = TOLERANCE) -> list[str]:
    """What is not as the model, or as one process, says."""
    name = found["name"]
    wrong = [
        f"{name}: {kind} {gap:+.2%} beside the model"
        for kind, gap in found["gaps"].items()
        if abs(gap) > tolerance
    ]
    state = found["state"]
    mean = sum(state["ranks"]) / len(state["ranks"])
    if abs(mean / state["predicted"] - 1) > tolerance:
        wrong.append(f"{name}: {mean:.0f} bytes of state a rank, the model has {state['predicted']:.0f}")
    if "losses" in found and not found["losses"]["worst"] <= LOSS:  # NaN is wrong too
        wrong.append(f"{name}: losses differ by {found['losses']['worst']:.1e} from those of one process")
    if found.get("of_bound", 0) > 1.02:
        wrong.append(f"{name}: {found['of_bound']:.3f} of the bytes that are promised at most")
    return wrong


def line_of(found: dict[str, Any]) -> str:
    """One case in one line."""
    sent = ", ".join(f"{kind} {value / 2**10:.1f}" for kind, value in sorted(found["counted"].items()))
    gap = max((abs(value) for value in found["gaps"].values()), default=0.0)
    worst = f", losses within {found['losses']['worst']:.0e}" if "losses" in found else ""
    state = sum(found["state"]["ranks"]) / len(found["state"]["ranks"])
    return f"{found['name']:28s} KiB a rank and step: {sent}; gap {gap:.2%}; state {state / 2**10:.0f} KiB{worst}"


def table(result: dict[str, Any]) -> str:
    """Counted and predicted bytes of each case."""
    body = []
    for found in result["cases"]:
        case, counted, predicted = found["case"], found["counted"], found["predicted"]
        kinds = [kind for kind in ("gradients", "weights", "gathers") if kind in predicted]
        chunked = case["method"] in scale_model.CHUNKED
        state = sum(found["state"]["ranks"]) / len(found["state"]["ranks"])
        body.append(
            [
                str(case["ranks"]),
                case["method"] + (f", K={case['chunks']}" if chunked else ""),
                {"float32": "fp32", "bfloat16": "bf16"}[case["dtype"]],
                *(" + ".join(f"{of[kind] / 2**10:.1f}" for kind in kinds) for of in (counted, predicted)),
                f"{counted.get('control', 0) / 2**10:.2f}",
                f"{state / 2**10:.0f}",
                f"{found['losses']['worst']:.0e}" if "losses" in found else "-",
            ]
        )
    head = (
        *("ranks", "method", "dtype", "KiB a step, counted", "the model's", "control"),
        *("state, KiB a rank", "losses differ by"),
    )
    return markdown(head, body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--methods", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if uneven := [ranks for ranks in args.ranks if ranks < 2 or scale_setup.BATCH % ranks]:
        parser.error(f"--ranks {uneven[0]} is not allowed; needs a divisor of {scale_setup.BATCH} from 2 on")
    torch.set_num_threads(1)
    found = []
    for ranks in args.ranks:
        cases = cases_of(ranks, args.methods, args.chunks)
        for case, records in zip(cases, run(ranks, cases, SIZE), strict=True):
            found.append(judged(case, records, SIZE))
            print(line_of(found[-1]), flush=True)
    settings = {
        "model": asdict(SIZE),
        "batch": scale_setup.BATCH,
        "tokens": scale_setup.TOKENS,
        "lr": scale_setup.LR,
    }
    common.write_json(args.out, common.header(0) | {"backend": "gloo", "settings": settings, "cases": found})
    if wrong := [text for each in found for text in faults(each)]:
        raise SystemExit("not as the model says: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
