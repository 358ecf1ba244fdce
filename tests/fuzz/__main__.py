"""Runs random programs for hours: ``python -m tests.fuzz --minutes 60 --seed 1``; prints each that fails, goes on."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .programs import FEATURES, Program, Seeded, program
from .runner import run
from .shrink import smaller


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--examples", type=int, help="stop after so many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the next has seed + 1")
    parser.add_argument(
        "--without", default="", help=f"features to leave out, by commas: {', '.join(FEATURES)}"
    )
    parser.add_argument("--replay", metavar="SEED or FILE", help="run one program, of a seed or a JSON file")
    parser.add_argument("--shrink", action="store_true", help="make each kind of failing program smaller")
    options = parser.parse_args(arguments)
    without = [name for name in options.without.split(",") if name]
    unknown = sorted(set(without) - set(FEATURES))
    if unknown:
        parser.error(f"--without={unknown[0]!r} is not known; allowed are {', '.join(FEATURES)}")
    torch.set_num_threads(1)
    if options.replay is not None:
        return replay(options.replay, without, options.shrink)
    kinds: Counter[str] = Counter()
    began, done = time.monotonic(), 0
    for seed in _seeds(options.seed, options.examples, began + 60 * options.minutes):
        candidate = program(Seeded(seed), without)
        error = failure(candidate)
        done += 1
        if error is not None:
            kinds[kind_of(error)] += 1
            if kinds[kind_of(error)] == 1:
                report(seed, smaller(candidate, failure) if options.shrink else candidate, error)
            else:
                print(f"seed {seed} fails as well: {kind_of(error)}", flush=True)
        if done % 100 == 0:
            seconds = time.monotonic() - began
            print(f"{done} programs, {kinds.total()} failed, {seconds / done:.3f} s each", flush=True)
    seconds = time.monotonic() - began
    print(f"{done} programs in {seconds:.0f} s ({seconds / max(done, 1):.3f} s each), {kinds.total()} failed")
    for kind, count in kinds.most_common():
        print(f"{count:6d}  {kind}")
    return int(bool(kinds))


def replay(which: str, without: list[str], shrink: bool) -> int:
    """Run the program of a seed, or of a file, with its error in full; 1 if there is one."""
    candidate: Program = (
        program(Seeded(int(which)), without) if which.isdecimal() else json.loads(Path(which).read_text())
    )
    error = failure(candidate)
    if error is None:
        print("no difference")
        return 0
    traceback.print_exception(error)
    report(which, smaller(candidate, failure) if shrink else candidate, error)
    return 1


def failure(candidate: Program) -> Exception | None:
    """What a program ends in, if not well."""
    try:
        run(candidate)
    except Exception as error:
        return error
    return None


def kind_of(error: Exception) -> str:
    """Its message without what differs from program to program."""
    text = re.sub(r"\b(layers\.\d+\.core|table|head)\.(weight|bias)\b(\[[^]]*\])?", "<weight>", str(error))
    return f"{type(error).__name__}: {re.sub(r'[-+]?[0-9][0-9.e+-]*', '#', text)[:160]}"


def report(seed: Any, candidate: Program, error: Exception) -> None:
    print(f"FAILED seed {seed}: {type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", []):
        print(f"  {note}")
    print(f"  {json.dumps(candidate)}", flush=True)


def _seeds(first: int, examples: int | None, until: float) -> Iterator[int]:
    seed = first
    while (examples is None or seed < first + examples) and time.monotonic() < until:
        yield seed
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
