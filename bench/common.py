"""What every benchmark shares: where data lies, the header of a result file, and the JSON writer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
PACKAGE = __package__  # bench in a checkout, chunkft_bench where it was installed
CHECKOUT = Path(__file__).resolve().parent.name == "bench" and (REPO / "pyproject.toml").is_file()
RESULTS = REPO / "bench" / "results" if CHECKOUT else Path.cwd() / "bench-results"
# Exit status of a benchmark that went through all cases and has no figure for some: to start it again changes nothing.
INCOMPLETE = 3
PACKAGES = (
    *(
        "torch",
        "transformers",
        "numpy",
        "triton",
        "badam",
        "galore-torch",
        "apollo-torch",
        "peft",
        "adam-mini",
    ),
    *("bitsandbytes", "torchao", "lomo-optim", "deepspeed", "trainstream", "roundpipe"),
)


def commit() -> str:
    """Hash of the checked-out commit, with `-dirty` where a tracked file of the package or bench/ differs.

    $CHUNKFT_COMMIT, if set and not empty, goes first: a machine that was sent the files alone is told so what they are.
    `unknown` outside of a checkout, and without git.
    """
    if told := os.environ.get("CHUNKFT_COMMIT", "").strip():
        return told
    if not CHECKOUT or shutil.which("git") is None:  # the folder may lie in the repository of somebody else
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    code = ["chunkft", "csrc", "bench/*.py"]
    diff = subprocess.run(
        ["git", "status", "--porcelain", "--", *code], cwd=REPO, capture_output=True, text=True
    )
    return head.stdout.strip() + ("-dirty" if diff.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that a benchmark can call."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(
        torch.__version__
    )  # with the CUDA it was built for, which wheels leave out of their metadata
    return found


def device_name() -> str:
    """The accelerator's name, else the CPU's model with the number of usable cores."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {usable_cores()} cores"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line() -> str:
    """What was typed: `chunkft bench ...`, or `python -m bench.NAME ...`; paths below the repository relative."""
    script = Path(sys.argv[0])
    if script.stem in ("chunkft", "__main__"):
        words = ["chunkft", *sys.argv[1:]]
    else:
        words = ["python", "-m", f"{PACKAGE}.{script.stem}", *sys.argv[1:]]
    return " ".join(words).replace(f"{REPO}/", "")


def header(seed: int, device: str | None = None) -> dict[str, Any]:
    """What repeats a figure: command, device, threads, versions, commit and seed, with the time of day.

    Where `device` names it nothing is asked of the accelerator by this process.
    """
    return {
        "command": command_line(),
        "device": device_name() if device is None else device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "seed": seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` beside `path` and renames it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none where the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def data_dir(name: str) -> Path:
    """Folder of a data set: below $CHUNKFT_DATA, else below `shared/data` beside the repository.

    Raises FileNotFoundError naming both places where neither holds it.
    """
    roots = [Path(os.environ["CHUNKFT_DATA"])] if "CHUNKFT_DATA" in os.environ else []
    roots.append(REPO.parent / "shared" / "data")
    for root in roots:
        if (root / name).is_dir():
            return root / name
    places = ", ".join(str(root / name) for root in roots)
    raise FileNotFoundError(
        f"data set {name!r} not found (looked in {places}); set CHUNKFT_DATA to its parent"
    )


def package_dir(name: str) -> Path:
    """Folder of an installed package, not imported; raises ModuleNotFoundError where it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {name!r} is not installed; pip install {name.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, linearly interpolated."""
    if not values:
        raise ValueError("quartiles: values is empty, expected at least one number")
    q = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return tuple(q.tolist())  # type: ignore[return-value]
