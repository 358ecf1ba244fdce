"""Steps of chunkft at a git revision beside those of this tree: the same benchmark in both, in processes by turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import common, harness

STEPS = 16
VARIANTS: dict[str, dict[str, Any]] = {
    "chunk K=4": {"chunks": 4, "interval": 1},
    "chunk K=16": {"chunks": 16, "interval": 1},
    "stream K=4": {"chunks": 4, "interval": 1, "residency": "stream", "page_bytes": 1 << 20},
}


def git(*words: str | Path, check: bool = True) -> str:
    """Standard output of git in the repository; raises RuntimeError with its message where it fails."""
    done = subprocess.run(["git", *map(str, words)], cwd=common.REPO, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"git {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def tree_of(rev: str) -> Iterator[Path]:
    """A temporary checkout of `rev` with this tree's benchmarks and a native core; gone afterwards.

    Raises RuntimeError where this is no checkout, `rev` does not exist, or its native core does not build.
    """
    if not common.CHECKOUT:
        raise RuntimeError(
            "--rev needs a checkout of chunkft with its git history; this is an installed package"
        )
    full = git("rev-parse", "--verify", f"{rev}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="chunkft-bench-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", tree, full)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            (tree / "bench").mkdir()
            for file in (common.REPO / "bench").glob("*.py"):
                shutil.copy2(file, tree / "bench")
            _native_core(tree, full)
            yield tree
        finally:
            git("worktree", "remove", "--force", tree)


def _native_core(tree: Path, rev: str) -> None:
    built = list((common.REPO / "chunkft").glob("_core.*.so"))
    same = not git("diff", "--name-only", rev, "--", "csrc", "CMakeLists.txt")
    if built and same:
        shutil.copy2(built[0], tree / "chunkft")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the native core of {rev[:12]} does not build: {done.stderr.strip()[-300:]}")


def run_child(tree: Path, model: str) -> dict[str, float]:
    """Seconds of a step of each variant with the chunkft of `tree`; raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "bench.revision", "--model", model]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(rev: str, model: str, rounds: int) -> dict[str, Any]:
    """Samples of `rev`, of this tree, and of this tree again, by turns; ratios of each variant, divided by AdamW's.

    Raises ValueError for fewer than four rounds, RuntimeError where a process fails.
    """
    if rounds < 4:
        raise ValueError(f"rounds={rounds}: allowed are 4 or more")
    with tree_of(rev) as tree:
        places = {"old": tree, "new": common.REPO, harness.AGAIN: common.REPO}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in places}
        for number in range(rounds):
            for name in places if number % 2 else reversed(places):
                taken[name].append(run_child(places[name], model))
    return judged(taken) | {"rev": rev, "model": model, "rounds": rounds}


def judged(taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Noise, and of every variant the ratio new / old with its verdict, from one dict of seconds a process."""
    names = [name for name in taken["old"][0] if name != "adamw"]

    def relative(place: str, name: str) -> list[float]:
        return [sample[name] / sample["adamw"] for sample in taken[place]]

    noise = max(
        harness.noise_of(harness.ratio(relative(harness.AGAIN, name), relative("new", name)))
        for name in names
    )
    rows = {}
    for name in names:
        found = harness.ratio(relative("new", name), relative("old", name))
        rows[name] = {
            "over_old": asdict(found),
            "verdict": harness.verdict(found, noise),
            "over_adamw": {place: relative(place, name) for place in taken},
        }
    return {"noise": noise, "too_noisy": noise > harness.TOO_NOISY, "variants": rows}


def steps(model: str) -> dict[str, float]:
    """CPU seconds of a step of full AdamW and of each variant in this process: medians of interleaved sweeps."""
    import chunkft

    from . import plain_llama

    torch.set_num_threads(1)
    device = torch.device("cpu")
    ids = plain_llama.batch_of(model, device, 2, 64)

    def step_of(options: dict[str, Any] | None) -> Any:
        net = plain_llama.build(model, device, torch.float32)
        if options is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
        else:
            optimizer = chunkft.ChunkAdamW(net, lr=1e-5, **options)

        def step() -> None:
            net(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    made = {"adamw": step_of(None)} | {name: step_of(options) for name, options in VARIANTS.items()}
    for name, step in made.items():  # a sweep, in which every slot of state is made
        for _ in range(VARIANTS.get(name, {}).get("chunks", 1)):
            step()
    taken = harness.interleave(made, STEPS, time.process_time)
    return {name: statistics.fmean(values) for name, values in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.revision", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="3M")
    args = parser.parse_args(arguments)
    print(json.dumps(steps(args.model)))


if __name__ == "__main__":
    main()
