"""`chunkft finetune` on several processes: the run of one process, one voice, and no rank that hangs."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
from clitools import (
    Launcher,
    assert_same_weights,
    environment,
    losses_of,
    needs_datasets,
    save_tiny_llama,
    sums,
    weights_of,
)
from torchrun_rigs import Ranks, free_port

from chunkft.cli.errors import UserError
from chunkft.cli.launch import Launch, launched
from chunkft.cli.shares import RankRows

pytestmark = needs_datasets
STEPS = 14


@pytest.fixture(scope="module")
def launcher():
    return Launcher()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("torchrun")
    save_tiny_llama(root / "model")
    save_tiny_llama(root / "dropout", dropout=0.1)
    sums(root / "train.jsonl", 41)  # the last global batch of 8 has one row: rank 1 has none
    sums(root / "held-out.jsonl", 9)
    rows = [f"{(7 * number) % 3}\tfoot {number}\n" for number in range(41)]
    (root / "train.tsv").write_text("".join(rows))
    return root


def arguments(root, out, batch, model="model", **changes):
    options = {
        "model": root / model,
        "data": root / "train.jsonl",
        "eval-data": root / "held-out.jsonl",
        "eval-every": 5,
        "steps": STEPS,
        "save-every": 3,
        "chunks": 3,
        "interval": 2,
        "batch-size": batch,
        "grad-accum": 2,
        "seq-len": 32,
        "lr": 1e-2,
        "max-grad-norm": 0.5,
        "device": "cpu",
        "out": out,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return ["finetune", *(part for name, value in options.items() for part in (f"--{name}", value))]


def records_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, other, tolerance=1e-5):
    first, second = records_of(one), records_of(other)
    assert len(first) == len(second)
    for mine, its in zip(first, second, strict=True):
        for name in ("step", "tokens", "chunk", "lr", "eval_accuracy", "eval_matthews"):
            assert mine.get(name) == its.get(name), name
        for name in ("loss", "eval_loss", "grad_norm"):
            assert (mine.get(name) is None) == (its.get(name) is None), (mine["step"], name)
            if mine.get(name) is None:
                continue
            assert mine.get(name) == pytest.approx(its.get(name), rel=tolerance), (mine["step"], name)


@pytest.fixture(scope="module")
def single(root, launcher):
    """One process with the global batch of two."""
    assert launcher.run(arguments(root, root / "single", 8), root / "single.log") == 0
    return root / "single"


@pytest.fixture(scope="module")
def undisturbed(root, launcher):
    """Two ranks, dropout, never disturbed."""
    run = Ranks(launcher, root / "undisturbed.ranks", 2, arguments(root, root / "undisturbed", 4, "dropout"))
    assert run.wait() == 0, run.log
    return root / "undisturbed"


def test_torchrun_gives_the_run_of_one_process_with_one_log(root, single, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "chunkft", *map(str, arguments(root, out, 4))]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(single, out)
    for name in (
        "2 processes (replicas): a step learns from 2 x 4 x 2 = 16 sequences",
        f"step {STEPS}/{STEPS}",
    ):
        assert done.stdout.count(name) == 1, done.stdout
    assert done.stdout.count("peak memory of the largest process") == 1
    assert not done.stderr.strip(), done.stderr
    one, two = weights_of(single), weights_of(out)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_three_ranks_with_classes_give_the_run_of_one_process(root, launcher, tmp_path):
    changes = {
        "task": "sequence-classification",
        "data": root / "train.tsv",
        "eval_data": root / "train.tsv",
        "weight_decay": 0.1,
        "steps": 9,
        "grad_accum": 1,
    }
    assert launcher.run(arguments(root, tmp_path / "one", 9, **changes), tmp_path / "log") == 0
    run = Ranks(launcher, tmp_path / "ranks", 3, arguments(root, tmp_path / "three", 3, **changes))
    assert run.wait() == 0, run.log
    assert_same_run(tmp_path / "one", tmp_path / "three")


def test_plain_adamw_on_two_ranks_gives_the_run_of_one_process(root, launcher, tmp_path):
    changes = {"optimizer": "adamw", "steps": 4}
    assert launcher.run(arguments(root, tmp_path / "one", 8, **changes), tmp_path / "log") == 0
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, tmp_path / "two", 4, **changes))
    assert run.wait() == 0, run.log
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("whom", ["agent", "rank 1"])
def test_a_signal_saves_on_all_ranks_and_the_resumed_run_ends_bit_identical(
    root, launcher, undisturbed, tmp_path, whom
):
    out = tmp_path / "out"
    run = Ranks(launcher, tmp_path / "first", 2, arguments(root, out, 4, "dropout"))
    run.until_step(out, 5)
    os.kill(run.process.pid if whom == "agent" else run.pid(1), signal.SIGINT)
    assert run.wait() != 0
    assert run.statuses() == {0: 130, 1: 130}, run.log
    last = losses_of(out)[-1][0]
    assert (out / "checkpoints" / f"checkpoint-{last}").is_dir()
    assert 5 <= last < STEPS
    assert f"torchrun --nproc-per-node 2 -m chunkft finetune --resume --out {out}" in run.log
    assert run.log.count("go on with") == 1
    again = Ranks(launcher, tmp_path / "second", 2, ["finetune", "--resume", "--out", out])
    assert again.wait() == 0, again.log
    assert_same_weights(undisturbed, out)
    assert losses_of(out) == losses_of(undisturbed)


def test_a_killed_rank_is_restarted_and_the_run_ends_bit_identical(root, launcher, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, out, 4, "dropout"), restarts=1)
    run.until_step(out, 7)
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert re.search(r"resuming at step (6|9|12) from", run.log), run.log
    assert "chunkft: rank 0: stopped, because another rank ended" in run.log
    assert run.statuses(1) == {0: 0, 1: 0}
    assert_same_weights(undisturbed, out)
    assert losses_of(out) == losses_of(undisturbed)


def test_one_process_goes_on_with_the_run_of_two(root, launcher, tmp_path):
    out = tmp_path / "out"
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, out, 4, steps=6))
    assert run.wait() == 0, run.log
    assert launcher.run(["finetune", "--resume", "--out", out, "--steps", 9], tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert "note: the run was on 2 processes, and is on 1 now" in log
    assert losses_of(out)[-1][0] == 9
