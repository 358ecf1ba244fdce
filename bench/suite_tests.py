"""Runs a folder of tests on several workers and keeps the outcome of each as it comes.

python -m bench.suite_tests tests/gpu --workers 8 --out tests.json

A fault of the device, such as an illegal access, spoils every later test of its process. So that only the test fails
which caused it, a worker whose device no longer answers ends, and pytest-xdist puts another in its place.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from . import common

SPOILT = 70  # exit status of a worker whose device no longer answers


class Outcomes:
    """Pytest plug-in of the controlling process: counts, and the failures with the end of their text."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
        self.failures: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.slowest: dict[str, float] = {}
        self.collected = 0
        self._head = common.header(0)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = max(self.collected, len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for set-up, call and clean-up of every test, of all workers."""
        if report.failed:
            self.counts["failed" if report.when == "call" else "error"] += 1
            self.failures[report.nodeid] = str(report.longrepr)[-3000:]
        elif report.skipped:
            self.counts["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[report.nodeid] = str(reason)[:200]
        elif report.when == "call":
            self.counts["passed"] += 1
            self.slowest[report.nodeid] = round(report.duration, 2)
        if report.when == "call" or report.failed:
            self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["error"] += 1
            self.failures[report.nodeid] = str(report.longrepr)[-3000:]

    def write(self) -> None:
        """Writes the JSON, the ten slowest tests in it."""
        if self.out is None:
            return
        slowest = dict(sorted(self.slowest.items(), key=lambda pair: -pair[1])[:10])
        content = {"counts": self.counts, "failures": self.failures, "skipped": self.skipped}
        common.write_json(self.out, {**self._head, **content, "slowest_s": slowest})


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    """Hook of the workers, which load this module as a plug-in: ends one whose device is spoilt."""
    if call.excinfo is None or "PYTEST_XDIST_WORKER" not in os.environ or not spoilt():
        return
    print(
        f"{item.nodeid}: {call.excinfo.exconly()}\nthe device no longer answers", file=sys.stderr, flush=True
    )
    os._exit(SPOILT)


def spoilt() -> bool:
    """Whether the device of this process refuses even a synchronisation."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.suite_tests", description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", help="files or folders of tests")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--marks", help="an expression of marks, such as 'not slow'")
    parser.add_argument("--collect-only", action="store_true", help="find the tests and run none")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    outcomes = Outcomes(args.out)
    words = ["-q", "-p", "no:cacheprovider", "-p", f"{common.PACKAGE}.suite_tests", "-rfE", "--tb=short"]
    if args.marks:
        words += ["-m", args.marks]
    if args.collect_only:
        words += ["--collect-only", "-qq"]
    elif args.workers > 1 and importlib.util.find_spec("xdist") is None:
        print("pytest-xdist is not installed: one test after the other, up to the first fault of the device")
    elif args.workers > 1:
        words += ["-n", str(args.workers), "--dist", "worksteal", "--max-worker-restart", "24"]
    status = int(pytest.main([*words, *args.paths], plugins=[outcomes]))
    outcomes.write()
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.counts.items() if count)
    print(f"{' '.join(args.paths)}: {counts or f'{outcomes.collected} found'}")
    # nothing collected is no success, unless the whole folder said why it is skipped
    return 0 if status == int(pytest.ExitCode.NO_TESTS_COLLECTED) and args.collect_only else status


if __name__ == "__main__":
    sys.exit(main())
