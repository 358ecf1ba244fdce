"""Runs the cases of `bench.gpu_suite`, each in a process group of its own, and writes what is known at once.

A case may hang, crash, or leave its device unusable: it ends, its children with it, and the next one starts. One file
holds everything: `suite.json` of a device, rewritten after every case and every few seconds within one, so that it is
complete but for seconds whenever and however the suite ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import common

GRACE = 5.0  # seconds between asking a group to end and killing it, and that a killed one may take
EVERY = 2.0  # seconds between two looks at the results of a running case
TAIL = 40  # last lines of output that are kept with a case
LONGEST, SHOWN = 1 << 16, 400  # characters of a line that are read at once, and that are kept with a case
LOGGED = 64 << 20  # characters of output that a case may leave in the log
OUT_OF_TIME, NOT_STARTED = "out of time", "no time left"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One command of the suite.

    `{out}` in the command is the file for its JSON, `{suite}` the file with the results of all cases before it, and
    `{device}` the folder of the device. It needs about `expect` seconds on a data-centre GPU and is not started where
    less is left; it is stopped after `limit`. Neighbours marked `together` run at the same time. A command that knows
    `--resume` is started again after a crash, up to `restarts` times, and goes on behind its earlier results.
    `rehearsal` is what `--dry-run` runs instead; empty where the rehearsal of another case of the slot covers this
    one.
    """

    name: str
    slot: str
    what: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    expect: float
    limit: float
    together: bool = False
    restarts: int = 0
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)  # of a rehearsal


class Suite:
    """Rows of cases by name in the JSON file of a device.

    A file that holds results and is not resumed, or that cannot be read, is kept beside the new one.
    """

    def __init__(self, path: Path, head: dict[str, Any], resume: bool) -> None:
        self.path = path
        rows = _rows(path)
        if path.exists() and (rows is None or (rows and not resume)):
            aside = time.strftime(f"{path.stem}-%Y%m%d-%H%M%S", time.gmtime())
            path.replace(path.with_name(f"{aside}-{time.time_ns() % 10**9:09d}{path.suffix}"))
        self.rows: dict[str, dict[str, Any]] = (rows or {}) if resume else {}
        self.stopping = threading.Event()
        self._head = head
        self._lock = threading.Lock()

    def done(self, name: str) -> bool:
        """Whether the case ended without an error."""
        return self.rows.get(name, {}).get("verdict") == "ok"

    def forget(self, names: Iterable[str]) -> None:
        """Leaves cases without a result, so that they run again."""
        for name in names:
            self.rows.pop(name, None)

    def put(self, name: str, row: dict[str, Any]) -> None:
        """Sets the row of a case and writes the file."""
        with self._lock:
            self.rows[name] = row
            try:
                common.write_json(self.path, {**self._head, "cases": self.rows})
            except OSError as error:  # a full disk: the rows are there yet, and the next case may find room
                print(f"{self.path} could not be written: {error}", file=sys.stderr, flush=True)


def _rows(path: Path) -> dict[str, dict[str, Any]] | None:
    """Rows of a suite's file; None where it holds none that can be read."""
    try:
        rows = json.loads(path.read_text())["cases"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()) else None


def run_all(
    cases: Sequence[Case], suite: Suite, seconds: float, say: Say, rehearse: bool = False, workers: int = 8
) -> None:
    """Runs those cases that are not done, in order, for at most `seconds`; those without time left get a row too."""
    deadline = time.monotonic() + seconds
    waiting = [case for case in cases if not suite.done(case.name)]
    if rehearse:  # nothing is measured, so that all may run at a time that needs only what ran before
        waiting = [replace(case, together=case.needs is not None) for case in waiting]
    for batch in batches(waiting):
        with ThreadPoolExecutor(workers if len(batch) > 1 else 1) as pool:
            waiting = [pool.submit(_run_safely, case, suite, deadline, say, rehearse) for case in batch]
            try:
                for future in waiting:
                    future.result()
            except BaseException:  # Ctrl-C, above all
                suite.stopping.set()
                end_all()
                raise


def batches(cases: Sequence[Case]) -> list[list[Case]]:
    """Neighbours of one slot that run together, and each other case alone."""
    found: list[list[Case]] = []
    for case in cases:
        beside = found and case.together and found[-1][-1].together and found[-1][-1].slot == case.slot
        if beside:
            found[-1].append(case)
        else:
            found.append([case])
    return found


def _run_safely(case: Case, suite: Suite, deadline: float, say: Say, rehearse: bool) -> None:
    """Runs a case; what goes wrong around it, such as a process that cannot be started, ends the case alone."""
    try:
        _run(case, suite, deadline, say, rehearse)
    except Exception as error:
        verdict = f"not run: {type(error).__name__}: {error}"
        suite.put(case.name, {**suite.rows.get(case.name, {}), "slot": case.slot, "verdict": verdict})
        say(f"{case.name:28s} {verdict}")


def _run(case: Case, suite: Suite, deadline: float, say: Say, rehearse: bool) -> None:
    row: dict[str, Any] = {"slot": case.slot, "what": case.what, "commit": common.commit()}
    row["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    before = suite.rows.get(case.name, {}).get("result")
    if suite.stopping.is_set():
        return
    if before is not None:
        row["result"] = before  # until there is something better
    if case.needs is not None and not suite.done(case.needs):
        suite.put(case.name, row | {"verdict": f"needs {case.needs}", "seconds": 0.0})
        say(f"{case.name:28s} needs {case.needs}")
        return
    part = suite.path.parent / f".{case.name.replace('/', '-')}.json"
    part.unlink(missing_ok=True)
    words = case.rehearsal if rehearse else case.command
    names = {"{out}": str(part), "{suite}": str(suite.path), "{device}": str(suite.path.parent)}
    for name, value in names.items():
        words = tuple(word.replace(name, value) for word in words)
    if not words:
        suite.put(
            case.name, row | {"verdict": "ok", "seconds": 0.0, "output": ["covered by another rehearsal"]}
        )
        return
    command = [sys.executable, *words]
    row["command"] = " ".join(["python", *words]).replace(f"{common.REPO}/", "")
    goes_on = case.restarts > 0 and _seed(part, before)
    begin = time.monotonic()
    lines: deque[str] = deque(maxlen=TAIL)
    code: int | str = 0
    for attempt in range(case.restarts + 1):
        left = deadline - time.monotonic()
        if left < (case.expect if attempt == 0 and not rehearse else 1.0):
            code = NOT_STARTED if attempt == 0 else code
            break
        code = _watched(
            case, [*command, *(["--resume"] if attempt or goes_on else [])], min(case.limit, left), part, suite,
            row, lines, rehearse,
        )  # fmt: skip
        if code in (0, common.INCOMPLETE, OUT_OF_TIME) or suite.stopping.is_set():
            break
    row["seconds"] = round(time.monotonic() - begin, 1)
    row["verdict"] = "ok" if code == 0 else code if isinstance(code, str) else _ended(code)
    _adopt(row, part, lines)
    part.unlink(missing_ok=True)
    suite.put(case.name, row)
    say(f"{case.name:28s} {row['verdict']:14s} {row['seconds']:6.1f} s  {_last(lines)}")


def _watched(
    case: Case,
    command: Sequence[str],
    limit: float,
    part: Path,
    suite: Suite,
    row: dict[str, Any],
    lines: deque[str],
    rehearse: bool,
) -> int | str:
    """Exit code of a command, or OUT_OF_TIME; its results are taken over while it runs."""
    environment = os.environ | surroundings(suite.path.parent) | (case.environment if rehearse else {})
    log = suite.path.with_suffix(".log")
    with contextlib.suppress(OSError):
        log.touch()
    process = subprocess.Popen(
        command,
        cwd=common.REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its children end with it
    )
    _GROUPS.add(process.pid)
    reader = threading.Thread(target=_read, args=(process, log, case.name, lines), daemon=True)
    reader.start()
    end = time.monotonic() + limit
    try:
        while True:
            try:
                return process.wait(min(EVERY, max(0.01, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return OUT_OF_TIME
                _adopt(row, part, lines)
                suite.put(case.name, row | {"verdict": "running"})
    finally:
        end_group(process)
        _GROUPS.discard(process.pid)
        reader.join(GRACE)


def surroundings(folder: Path) -> dict[str, str]:
    """Variables that every case gets: this package wherever it runs, and a cache that Triton can write."""
    found = {"PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(common.REPO), os.environ.get("PYTHONPATH"))))
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    nearest = next((place for place in (home / ".triton", home) if place.exists()), home)
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(nearest, os.W_OK):
        found["TRITON_CACHE_DIR"] = str(folder / ".triton")
    return found


def _seed(part: Path, before: dict[str, Any] | None) -> bool:
    """Puts what an earlier run measured where the command goes on behind it; errors are tried again."""
    records = (before or {}).get("records")
    kept = {k: r for k, r in records.items() if "error" not in r} if isinstance(records, dict) else {}
    if kept:
        common.write_json(part, {**(before or {}), "running": None, "records": kept})
    return bool(kept)


_GROUPS: set[int] = set()


def end_group(process: subprocess.Popen[str]) -> None:
    """Ends a process and everything that it started; returns after seconds even if the system cannot end it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def end_all() -> None:
    """Kills every group that runs."""
    for group in list(_GROUPS):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _read(process: subprocess.Popen[str], log: Path, name: str, lines: deque[str]) -> None:
    stream = process.stdout
    assert stream is not None
    left = LOGGED
    for line in iter(lambda: stream.readline(LONGEST), ""):
        lines.append(line.rstrip("\n")[:SHOWN])
        if left > 0:
            left -= len(line)
            # a disk that is full must not stop the reading: the process would wait for it
            with contextlib.suppress(OSError), log.open("a") as file:
                file.write(f"[{name}] {line}" if line.endswith("\n") else f"[{name}] {line}\n")


def _adopt(row: dict[str, Any], part: Path, lines: deque[str]) -> None:
    row["output"] = list(lines)
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is no JSON: what was there stays
        row["result"] = json.loads(part.read_text())


def _ended(code: int) -> str:
    if code == common.INCOMPLETE:
        return "some figures missing"
    if code >= 0:
        return f"failed ({code})"
    try:
        return f"killed ({signal.Signals(-code).name})"
    except ValueError:
        return f"killed ({-code})"


def _last(lines: deque[str]) -> str:
    for line in reversed(list(lines)):  # a reader may be at work yet
        if line.strip():
            return line.strip()[:110]
    return ""
