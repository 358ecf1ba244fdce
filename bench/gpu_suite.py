"""First contact with a GPU, and every measurement on it, in the order of value and within a given time.

python -m bench.gpu_suite --minutes 12           all slots, as far as the time goes
python -m bench.gpu_suite a b                    the named slots
python -m bench.gpu_suite paper/paged            the named cases
python -m bench.gpu_suite --resume               what earlier runs on this device did not finish
python -m bench.gpu_suite --dry-run              rehearses every case, small and on the CPU
python -m bench.gpu_suite --list                 slots and cases with their expected seconds

Every case runs in a process group of its own: one that hangs, crashes or spoils its device ends alone. Results are in
`bench/results/DEVICE/suite.json`, one file that is complete whenever the suite ends, with all output beside it in
`suite.log`. `python -m bench.suite_report FILE` shows them beside the predictions.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import common
from .suite_cases import SLOTS, WORKERS, all_cases
from .suite_run import Case, Say, Suite, run_all

REHEARSED = "rehearsal"  # folder of a dry run's results
FIRST = ("contact/build", "contact/machine")
ASKING = 120  # seconds for the name of the GPU, which the first import of torch is part of


def folder_name(device: str) -> str:
    """A device's name as a folder name: lower case, everything but letters and digits a dash."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unnamed"


def gpu_name() -> str:
    """Name of the first CUDA device, asked for by another process, so that this one takes no memory on it.

    Raises RuntimeError where torch sees none.
    """
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=ASKING)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the GPU did not tell its name within {ASKING} s") from None
    name = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0 or not name:
        said = (done.stderr.strip().splitlines() or ["torch sees no CUDA device"])[-1]
        raise RuntimeError(f"no GPU to measure: {said}; --dry-run rehearses on the CPU")
    return name


def select(names: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Cases of the named slots, and the named ones, in the suite's order; without names all.

    Raises ValueError for a name that is neither.
    """
    known = {case.name for case in cases}
    for name in names:
        if name not in known and name not in SLOTS:
            allowed = ", ".join([*SLOTS, *sorted(known)])
            raise ValueError(f"{name!r} is no slot and no case; allowed are {allowed}")
    return [case for case in cases if not names or case.name in names or case.slot in names]


def with_build(chosen: Sequence[Case], cases: Sequence[Case]) -> list[Case]:
    """The chosen cases behind those that they need."""
    needed = {case.needs for case in chosen}
    return [case for case in cases if case in chosen or case.name in needed]


def shown(cases: Sequence[Case]) -> str:
    """Slots and cases, one line each."""
    lines = []
    for slot, what in SLOTS.items():
        own = [case for case in cases if case.slot == slot]
        lines.append(f"{slot}  {what}")
        lines += [f"   {case.name:28s} {case.expect:5.0f} s  {case.what}" for case in own]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    cases = all_cases() if cases is None else cases
    parser = argparse.ArgumentParser(
        prog="bench.gpu_suite",
        description=__doc__.split("\n")[0],
        epilog="slots: " + "; ".join(f"{slot}: {what}" for slot, what in SLOTS.items()),
    )
    parser.add_argument("names", nargs="*", help="slots or cases to run (default: all)")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything (default 12)")
    parser.add_argument("--resume", action="store_true", help="leave out what ended without an error before")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, small")
    parser.add_argument("--list", action="store_true", help="show slots and cases and stop")
    parser.add_argument(
        "--host-memory",
        metavar="BYTES",
        help="such as 120GiB, where memory grows as it is used (CHUNKFT_HOST_MEMORY)",
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="default %(default)s")
    parser.add_argument(
        "--workers", type=int, help=f"cases that may run at once (default {WORKERS}, or 2 in a dry run)"
    )
    args = parser.parse_args(arguments)
    if args.list:
        print(shown(cases))
        return 0
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} is not allowed; needs more than 0")
    try:
        chosen = with_build(select(args.names, cases), cases)
        device = REHEARSED if args.dry_run else gpu_name()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if args.host_memory:
        os.environ["CHUNKFT_HOST_MEMORY"] = args.host_memory  # for all cases
    folder = args.results / folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suite.json"
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"another suite writes into {folder}; wait for it, or name other --results")
    except OSError as error:  # a file system without locks
        print(f"{folder} cannot be locked ({error}): start no second suite there", file=sys.stderr)
    try:
        with _ended_as_by_hand():
            return _suite(args, cases, chosen, device, path)
    finally:
        os.close(lock)


def _suite(
    args: argparse.Namespace, cases: Sequence[Case], chosen: Sequence[Case], device: str, path: Path
) -> int:
    """Runs the chosen cases; the process's exit status."""
    workers = args.workers or (min(2, common.usable_cores()) if args.dry_run else WORKERS)
    head = common.header(0, device) | {"kind": "rehearsed" if args.dry_run else "measured", "gpu": device}
    kept = args.resume or bool(args.names)  # cases that were not asked for stay as they are
    suite = Suite(path, head, kept)
    if args.names and not args.resume:
        suite.forget(case.name for case in chosen if case.name not in FIRST)
    if not args.dry_run:
        # another day's machine is another machine
        suite.forget(case.name for case in chosen if case.name in FIRST)
    say = _teller(time.monotonic())
    say(f"{device}: {len(chosen)} cases in {args.minutes:g} minutes, results in {path}")
    try:
        run_all(chosen, suite, 60 * args.minutes, say, args.dry_run, workers)
    except KeyboardInterrupt:
        say(f"stopped; --resume goes on; results so far in {path}")
        return 130
    bad = [name for name in (case.name for case in chosen) if not suite.done(name)]
    say(
        f"{len(chosen) - len(bad)} of {len(chosen)} cases ended well"
        + (f"; not: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


@contextlib.contextmanager
def _ended_as_by_hand() -> Iterator[None]:
    """A suite that is told to end, by `timeout` or a closed terminal, ends its case too, as after Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    told = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    # what is ignored stays so: that is how nohup works
    before = {one: signal.signal(one, stop) for one in told if signal.getsignal(one) is signal.SIG_DFL}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _teller(start: float) -> Say:
    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
