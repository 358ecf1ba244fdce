"""Records what the pictures of docs/larger-than-gpu.md show: a step of streamed training in time, and bytes over depth.

python -m bench.streamed_picture               both, into bench/results/; python scripts/draw_docs.py draws them

The step is that of a 28M Llama on this CPU: its copies are the pagers' own trace, its blocks the times between their
coming and their leaving. Of many steps the fastest is kept: what else the machine did disturbed it least. The bytes are
those of distinct storages that parameters and slots lie in, the most at any moment of a training step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import chunkft
from chunkft.weights import HostLeaves, WeightStream

from . import common, plain_llama
from .streamed_setup import Setting, Trial

STEP, DEPTH = "streamed-step.json", "streamed-depth.json"
STEPS = 80
LAYERS = (4, 8, 16, 32)
Span = tuple[str, str, int, int]  # lane, label, start and end in nanoseconds


@contextmanager
def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Inside, a method is `around(method, *arguments)`."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *arguments: around(method, *arguments))
    try:
        yield
    finally:
        setattr(owner, name, method)


class Watch:
    """Spans of blocks and of gradients that come down; those of copies up are in the pagers' traces."""

    def __init__(self, trial: Trial) -> None:
        assert trial.stream is not None
        assert trial.stream.ring is not None
        residence = trial.optimizer._attachment.wiring.residence
        assert isinstance(residence, HostLeaves)
        self._trial, self._stream, self._ring = trial, trial.stream, trial.stream.ring
        self._inbox = residence._inbox
        self._since: dict[int, int] = {}
        self.spans: list[Span] = []

    def step(self) -> list[Span]:
        """One training step, from its beginning to its end."""
        self.spans = []
        begin = time.perf_counter_ns()
        with (
            wrapped(self._ring, "hold", self._hold),
            wrapped(self._ring, "leave", self._leave),
            wrapped(self._inbox, "_receive", self._receive),
        ):
            _, update = self._trial.step()
        end = time.perf_counter_ns()
        self.spans.append(("update", "update in host memory", end - int(1e9 * update), end))
        for kind, pager in self._stream.pagers.items():
            for event in pager.trace()["traceEvents"]:
                start = int(1e3 * event.get("ts", 0))
                if event["ph"] == "X" and start >= begin and event["cat"] in ("load", "wait"):
                    lane = "wait" if event["cat"] == "wait" else f"up, {kind}"
                    label = str(event["args"]["page"])
                    self.spans.append((lane, label, start, start + int(1e3 * event["dur"])))
        self.spans.append(("step", "", begin, end))
        return sorted(self.spans, key=lambda span: span[2])

    def _hold(self, hold: Callable[[int], None], number: int) -> None:
        hold(number)
        self._since.setdefault(number, time.perf_counter_ns())

    def _leave(self, leave: Callable[[int], None], number: int) -> None:
        end = time.perf_counter_ns()
        start = self._since.pop(number, None)
        leave(number)
        if start is not None:
            again = any(lane == "forward" and label == str(number) for lane, label, *_ in self.spans)
            self.spans.append(("backward" if again else "forward", str(number), start, end))

    def _receive(self, receive: Callable[..., None], *arguments: Any) -> None:
        start = time.perf_counter_ns()
        receive(*arguments)
        self.spans.append(("down", "gradient", start, time.perf_counter_ns()))


def record_step(model: str, tokens: int, steps: int) -> dict[str, Any]:
    """The fastest of some steps of a model whose blocks are trained from its second one upwards."""
    layers = plain_llama.SHAPES[model].layers
    setting = Setting(
        model, tokens, 0, max(1, layers // 3), steps, 1 << 20, 1 << 20, torch.device("cpu"), torch.float32
    )
    trial = Trial("host", setting, steps + 3)
    try:
        watch = Watch(trial)
        for _ in range(2):
            trial.step()
        found = min((watch.step() for _ in range(steps)), key=lambda spans: _length(spans))
    finally:
        trial.close()
    begin = next(start for lane, _, start, _ in found if lane == "step")
    return {
        "model": model,
        "tokens": tokens,
        "steps": steps,
        "blocks": layers,
        "trained": setting.trained[0],
        "unit": "microseconds from the beginning of the step: lane, label, start, length",
        "spans": [
            [lane, label, round((start - begin) / 1e3), round((end - start) / 1e3)]
            for lane, label, start, end in found
        ],
    }


def _length(spans: Sequence[Span]) -> int:
    return next(end - start for lane, _, start, end in spans if lane == "step")


def record_depth(layers: int) -> dict[str, Any]:
    """Bytes of weights on the device of a model with so many layers, resident and streamed, counted while it trains."""
    shape = plain_llama.Shape(192, layers, 512, 6, 6, 4096)
    torch.manual_seed(0)
    model = plain_llama.PlainLlama(shape, checkpointing=True).train()
    resident = storages(model.parameters())
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1, weights="stream", device="cpu")
    stream = optimizer._stream
    assert stream is not None
    assert stream.ring is not None
    most: dict[str, int] = {}

    def hold(method: Callable[[int], None], number: int) -> None:
        method(number)
        for kind, size in on_device(stream).items():
            most[kind] = max(most.get(kind, 0), size)

    ids = torch.randint(0, shape.vocab, (1, 9))
    with wrapped(stream.ring, "hold", hold):
        for _ in range(len(optimizer.plan)):
            model(ids).backward()
            optimizer.step()
    found = {
        "layers": layers,
        "resident": resident,
        "streamed": most,
        "block": max(block.nbytes for block in stream.streamed),
        "tile": max(size for table in stream.units.tables for size in table.tiles),
        "host": stream.memory()["host"],
    }
    optimizer.detach()
    return found


def on_device(stream: WeightStream) -> dict[str, int]:
    """Bytes by kind of the storages on the device: slots, and what parameters lie in outside of host memory."""
    pagers = {kind: storages(pager._slots) for kind, pager in stream.pagers.items()}
    slots = {slot.untyped_storage().data_ptr() for pager in stream.pagers.values() for slot in pager._slots}
    rest = []
    for name, parameter in stream.model.named_parameters():
        place = parameter.untyped_storage().data_ptr()
        at_home = stream.streams(name) and place == stream.home(name).untyped_storage().data_ptr()
        if not at_home and place not in slots:
            rest.append(parameter)
    return pagers | {"rest": storages(rest)}


def storages(tensors: Any) -> int:
    """Bytes of the distinct storages of tensors."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def write_compactly(path: Path, result: dict[str, Any], rows: str) -> None:
    """As `common.write_json`, but one line for each of the `rows`."""
    common.write_json(path, {**result, rows: None})
    lines = ",\n".join("  " + json.dumps(row) for row in result[rows])
    path.write_text(path.read_text().replace(f'"{rows}": null', f'"{rows}": [\n{lines}\n ]'))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.streamed_picture", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("step", "depth"), help="one of the two records")
    parser.add_argument("--model", choices=plain_llama.SHAPES, default="28M")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of which the fastest is kept (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the other core copies
    if args.only != "depth":
        step = record_step(args.model, args.tokens, args.steps)
        write_compactly(args.out / STEP, common.header(0) | step, "spans")
        length = next(row[3] for row in step["spans"] if row[0] == "step")
        waits = sum(row[3] for row in step["spans"] if row[0] == "wait")
        copies = sum(row[3] for row in step["spans"] if row[0].startswith("up"))
        print(f"step {length / 1e3:.1f} ms, copies up {copies / 1e3:.1f} ms, waited for {waits / 1e3:.1f} ms")
    if args.only != "step":
        cases = [record_depth(layers) for layers in LAYERS]
        write_compactly(args.out / DEPTH, common.header(0) | {"cases": cases}, "cases")
        for case in cases:
            streamed = sum(case["streamed"].values())
            print(
                f"{case['layers']:3d} layers: resident {case['resident'] / 2**20:.1f} MiB, streamed "
                f"{streamed / 2**20:.1f} MiB, {streamed / case['block']:.2f} blocks"
            )


if __name__ == "__main__":
    main()
