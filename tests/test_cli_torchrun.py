"""`chunkft finetune` on several processes: the run of one process, one voice, and no rank that hangs."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from clitools import (
    assert_same_weights,
    environment,
    losses_of,
    needs_datasets,
    save_tiny_llama,
    sums,
    weights_of,
)
from torchrun_rigs import RankLauncher, Ranks, free_port

from chunkft.cli.errors import PeerError, UserError
from chunkft.cli.launch import Launch, launched
from chunkft.cli.ranks import Ranks as RanksOfCommand
from chunkft.cli.shares import RankRows
from chunkft.parallel.ranks import explained

pytestmark = needs_datasets
STEPS = 11


@pytest.fixture(scope="module")
def launcher():
    return RankLauncher()


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
    run.until_step(out, 4)
    os.kill(run.process.pid if whom == "agent" else run.pid(1), signal.SIGINT)
    assert run.wait() != 0
    assert run.statuses() == {0: 130, 1: 130}, run.log
    last = losses_of(out)[-1][0]
    assert (out / "checkpoints" / f"checkpoint-{last}").is_dir()
    assert 4 <= last < STEPS
    assert f"torchrun --nproc-per-node 2 -m chunkft finetune --resume --out {out}" in run.log
    assert run.log.count("go on with") == 1
    again = Ranks(launcher, tmp_path / "second", 2, ["finetune", "--resume", "--out", out])
    assert again.wait() == 0, again.log
    assert_same_weights(undisturbed, out)
    assert losses_of(out) == losses_of(undisturbed)


def test_a_killed_rank_is_restarted_and_the_run_ends_bit_identical(root, launcher, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, out, 4, "dropout"), restarts=1)
    run.until_step(out, 4)
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert re.search(r"resuming at step (3|6|9) from", run.log), run.log
    assert "chunkft: rank 0: stopped, because another rank ended" in run.log
    assert run.statuses(1) == {0: 0, 1: 0}
    assert_same_weights(undisturbed, out)
    assert losses_of(out) == losses_of(undisturbed)


def test_one_process_goes_on_with_the_run_of_two(launcher, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    more = ["finetune", "--resume", "--out", out, "--steps", STEPS + 2]
    assert launcher.run(more, tmp_path / "log") == 0
    assert "note: the run was on 2 processes, and is on 1 now" in (tmp_path / "log").read_text()
    assert losses_of(out)[-1][0] == STEPS + 2


def fail_at(step, error):
    """Makes the run of this process fail at the end of a step."""
    from chunkft.cli.shared_trainer import SharedTrainer

    whole = SharedTrainer._exchange

    def exchange(self, *args):
        if self.state.global_step == step:
            raise error
        whole(self, *args)

    SharedTrainer._exchange = exchange


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        fail_at(4, ArithmeticError("the fault of this test"))


def fail_to_write():
    if os.environ["RANK"] == "0":  # its checkpoints are larger than a file may be
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def fail_to_finish():
    from chunkft.cli.outputs import RunDirectory

    def save_model(self, *args):
        raise OSError(28, "No space left on device")

    RunDirectory.save_model = save_model


def test_the_rank_that_raises_is_named_with_its_traceback_and_the_others_say_why_they_end(
    root, launcher, tmp_path
):
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, tmp_path / "out", 4), before=fail_on_rank_1)
    assert run.wait() == 1
    assert "rank 1: Traceback (most recent call last)" in run.log
    assert run.log.count("chunkft: rank 1: ArithmeticError: the fault of this test") == 1
    assert (
        "chunkft: rank 0: stopped, because rank 1 failed: ArithmeticError: the fault of this test" in run.log
    )
    assert run.statuses()[1] == 1


@pytest.mark.parametrize(
    ("before", "reason"), [(fail_to_write, "File too large"), (fail_to_finish, "No space left on device")]
)
def test_all_ranks_end_when_rank_0_cannot_write(root, launcher, tmp_path, before, reason):
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, tmp_path / "out", 4, steps=4), before=before)
    assert run.wait() == 1
    assert run.statuses() == {0: 1, 1: 1}, run.log
    said = [line for line in run.log.splitlines() if line.startswith("chunkft: rank")]
    assert len(said) == 2, run.log
    assert all(reason in line for line in said)
    assert any(line.startswith("chunkft: rank 1: stopped, because rank 0 failed") for line in said)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        (
            {"out": "/proc/absent"},
            "chunkft: --out /proc/absent: cannot be written: No such file or directory",
        ),
        ({"weights": "stream"}, "chunkft: --weights stream is for one process"),
    ],
)
def test_wrong_input_is_told_once(root, launcher, tmp_path, changes, text):
    run = Ranks(
        launcher, tmp_path / "ranks", 2, arguments(root, **({"out": tmp_path / "out", "batch": 4} | changes))
    )
    assert run.wait() == 1
    assert run.statuses() == {0: 2, 1: 2}
    assert run.log.count("chunkft:") == 1
    assert "rank 0: Traceback" not in run.log
    assert text in run.log


def be_late_on_rank_0():
    if os.environ["RANK"] == "0":
        time.sleep(1)


@pytest.mark.parametrize(
    "wrong",
    [
        ["finetune", "--chunks", 0],
        ["finetune", "--bogus"],
        ["finetune", "--fsdp"],
        ["finetune", "--resume"],
    ],
)
def test_a_mistake_in_the_arguments_is_told_by_rank_0(launcher, tmp_path, wrong):
    run = Ranks(launcher, tmp_path / "ranks", 2, wrong, before=be_late_on_rank_0)
    assert run.wait() == 1
    assert run.statuses() == {0: 2, 1: 2}
    assert run.log.count("chunkft:") == 1
    assert wrong[1] in run.log


def test_a_resumed_run_with_another_option_is_refused_as_wrong_input(launcher, undisturbed, tmp_path):
    wrong = ["finetune", "--resume", "--batch-size", 2, "--out", undisturbed]
    run = Ranks(launcher, tmp_path / "ranks", 2, wrong)
    assert run.wait() == 1
    assert run.statuses() == {0: 2, 1: 2}
    assert run.log.count("chunkft:") == 1
    assert "chunkft: --resume: --batch-size 2 differs from 4 of the run" in run.log


@pytest.mark.parametrize(
    "error",
    [
        UserError("--resume: --seed 1 differs from 0 of the run; may change: --dist-timeout, --steps"),
        OSError(110, "Connection timed out"),
        RuntimeError("--data socket.jsonl: gloo, nccl, and a broken pipe"),
    ],
)
def test_an_error_that_is_of_no_collective_is_not_blamed_on_other_ranks(error):
    ranks = RanksOfCommand(0, 2, store=dist.HashStore())
    with pytest.raises(type(error)) as caught, ranks.watched():
        raise error
    assert caught.value is error


def errors_of_collectives():
    with pytest.raises(RuntimeError) as caught, explained("reducing gradients"):
        raise RuntimeError("closed")
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    return [caught.value, RuntimeError(gloo), dist.DistNetworkError("closed")]


@pytest.mark.parametrize("told", ["", "1 ArithmeticError: first"])
@pytest.mark.parametrize("error", errors_of_collectives())
def test_a_collective_that_fails_is_blamed_on_other_ranks(error, told):
    store = dist.HashStore()
    if told:
        store.set("failed", told)
    says = "rank 1 failed: ArithmeticError: first" if told else "another rank ended or did not answer"
    with pytest.raises(PeerError, match=says), RanksOfCommand(0, 2, store=store).watched():
        raise error


def test_sharded_weights_give_the_run_of_one_process_and_resume(root, launcher, tmp_path):
    changes = {"chunks": 1, "steps": 6}
    assert launcher.run(arguments(root, tmp_path / "one", 8, **changes), tmp_path / "log") == 0
    out = tmp_path / "out"
    first = [*arguments(root, out, 4, **changes), "--fsdp"]
    run = Ranks(launcher, tmp_path / "first", 2, first, restarts=1)
    run.until_step(out, 5)
    os.kill(run.pid(0), signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert "resuming at step 3 from" in run.log
    assert "2 processes (shards of the weights)" in run.log
    assert_same_run(tmp_path / "one", out)
    one, two = weights_of(tmp_path / "one"), weights_of(out)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_memory_table_of_replicas_has_the_gradients_of_a_rank(root, launcher, tmp_path):
    changes = {"steps": 6, "chunks": 3, "interval": 1, "grad_accum": 1}
    run = Ranks(launcher, tmp_path / "ranks", 2, arguments(root, tmp_path / "out", 4, **changes))
    assert run.wait() == 0, run.log
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert 1 / 3 <= memory["this_run"]["gradients"] / memory["full_adamw"]["gradients"] < 0.5


@pytest.mark.parametrize("optimizer", ["chunkadamw", "adamw"])
def test_the_memory_table_has_the_shards_of_the_largest_rank(root, launcher, tmp_path, optimizer):
    command = arguments(root, tmp_path / "out", 4, steps=2, optimizer=optimizer)
    run = Ranks(launcher, tmp_path / "ranks", 2, [*command, "--fsdp"])
    assert run.wait() == 0, run.log
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())
    whole = sum(weight.numel() * 4 for weight in weights_of(tmp_path / "out").values())
    assert memory["weights"] == whole
    assert whole / 2 <= memory["weights_held"] < 0.55 * whole
    assert re.search(r"^weights .* 0\.5\d\d$", run.log, re.MULTILINE), run.log
    assert memory["this_run"]["gradients"] > 0.3 * memory["full_adamw"]["gradients"]
    if optimizer == "adamw":
        for name in ("gradients", "optimizer state"):
            assert 0.5 <= memory["this_run"][name] / memory["full_adamw"][name] < 0.55


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--fsdp"], "--fsdp needs torchrun"),
        (["--dist-timeout", "5"], "--dist-timeout 5 needs torchrun"),
        (["--fsdp", "--weights", "stream"], "--fsdp and --weights stream exclude each other"),
    ],
)
def test_options_of_many_processes_are_refused_without_them(root, launcher, tmp_path, extra, text):
    command = [*arguments(root, tmp_path / "out", 4), *extra]
    assert launcher.run(command, tmp_path / "log") == 2
    assert text in (tmp_path / "log").read_text()


ENDS = """
import os
from pathlib import Path

import torch

from chunkft.cli.launch import joined, launched
from chunkft.parallel import Ranks


def threads():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def work(ranks):
    holder = {"ranks": Ranks(torch.distributed.group.WORLD)}  # as an optimizer has them
    holder["self"] = holder
    holder["ranks"].total(torch.ones(1), "a test")
    ranks.objects(None)
    return threads()


with joined(launched(), torch.device("cpu"), 60) as ranks:
    during = work(ranks)
print(during > 0, threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of threads are read from /proc")
def test_no_thread_of_a_group_is_left_when_the_interpreter_ends():
    """One that drops a tensor when the interpreter has begun to end calls terminate."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], env=environment() | place, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["True", "0"]), ended.stderr


def test_the_place_of_a_process_is_read_from_the_environment():
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    found = place | {"MASTER_ADDR": "host", "MASTER_PORT": "1", "TORCHELASTIC_MAX_RESTARTS": "2"}
    assert launched(found) == Launch(3, 4, 1, 2, 0, True)
    assert launched(place) is None
    assert launched({}) is None
    with pytest.raises(UserError, match="RANK=4 is not below WORLD_SIZE=4"):
        launched(found | {"RANK": "4"})
    with pytest.raises(UserError, match="WORLD_SIZE='many'"):
        launched(found | {"WORLD_SIZE": "many"})


def test_shares_of_a_global_batch_are_its_rows_each_once_and_none_is_empty():
    rows = [{"input_ids": [number, 9], "labels": [number, 9]} for number in range(11)]
    for indices in (list(range(6)), [7, 3, 10], [4]):
        shares = [RankRows(rows, rank, 2).__getitems__(indices) for rank in range(3)]
        learned = [row for share in shares for row in share if row["labels"] != [-100]]
        assert learned == [rows[index] for index in indices]
        assert all(1 <= len(share) <= 2 for share in shares)
