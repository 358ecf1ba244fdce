"""Kills `chunkft finetune` with SIGKILL at random moments, resumes it, and compares the final weights bit by
bit.

    python -m bench.faults --trials 20 --seed 0

Every trial kills a run once or more at moments drawn over its whole length, from before the first step to the
writing
of the final model, and lets a resumed run finish.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .common import REPO, RESULTS, header, write_json

sys.path.insert(0, str(REPO / "tests"))

from clitools import Launcher, fault_run, kill_and_resume, losses_of, weights_of


def same_weights(one: Path, other: Path) -> bool:
    """Whether two finished runs have bit-identical weights."""
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def verdict(entry: dict[str, Any]) -> str:
    """What a line of output says about a trial."""
    parts = ("weights", "identical"), ("losses", "identical_losses")
    return ", ".join(f"{name} {'identical' if entry[key] else 'DIFFERENT'}" for name, key in parts)


def trial(launcher: Launcher, root: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """One run with one to three kills, compared with the undisturbed run."""
    out = root / f"trial-{number}"
    moments = [(rng.uniform(0.0, 1.0), rng.uniform(0.0, 0.3)) for _ in range(rng.choice((1, 2, 2, 3)))]
    kills = kill_and_resume(launcher, fault_run(root), out, moments, root / "log")
    return {
        "trial": number,
        "kills": kills,
        "identical": same_weights(root / "undisturbed", out),
        "identical_losses": losses_of(root / "undisturbed") == losses_of(out),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    launcher = Launcher()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = fault_run(root)
        if launcher.run([*run, "--out", root / "undisturbed"], root / "log") != 0:
            raise RuntimeError((root / "log").read_text())
        trials = []
        for number in range(arguments.trials):
            trials.append(trial(launcher, root, number, rng))
            kills = ", ".join(
                f"{'killed' if kill['killed'] else 'done'} at step {kill['step']}"
                for kill in trials[-1]["kills"]
            )
            print(f"trial {number}: {kills}: {verdict(trials[-1])}", flush=True)
    identical = sum(entry["identical"] and entry["identical_losses"] for entry in trials)
    killed = sum(kill["killed"] for entry in trials for kill in entry["kills"])
    result = header(arguments.seed) | {
        "trials": len(trials),
        "identical": identical,
        "kills": killed,
        "runs": trials,
    }
    write_json(arguments.out, result)
    print(f"{identical} of {len(trials)} runs bit-identical after {killed} kills")
    return 0 if identical == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
