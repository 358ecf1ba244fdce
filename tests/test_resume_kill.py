"""A run that is killed at any moment and resumed ends with the weights of the undisturbed run, bit for bit."""

import errno
import json
import os
import random
import resource
import signal
import time

import pytest
from clitools import (
    FAULT_STEPS,
    Launcher,
    assert_same_weights,
    command,
    environment,
    fault_run,
    kill_and_resume,
    losses_of,
    run_command,
)

from chunkft.integrations.checkpoints import (
    CheckpointWriteError,
    clean_up,
    complete_checkpoints,
    publish,
    rotate,
    staging,
    writing,
)

KILLS = 3


@pytest.fixture(scope="module")
def launcher():
    return Launcher()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, launcher):
    root = tmp_path_factory.mktemp("undisturbed")
    run = fault_run(root)
    log = root / "log"
    assert launcher.run([*run, "--out", root / "warm", "--quiet"], log) == 0, log.read_text()
    assert launcher.run([*run, "--out", root / "out"], log) == 0, log.read_text()
    return root, run


def test_killed_and_resumed_run_ends_bit_identical(undisturbed, launcher, tmp_path):
    root, run = undisturbed
    rng = random.Random(20)
    moments = [(rng.uniform(0.1, 0.5), rng.uniform(0.0, 0.1)) for _ in range(KILLS)]
    kills = kill_and_resume(launcher, run, tmp_path / "out", moments, tmp_path / "log")
    assert any(kill["killed"] for kill in kills)
    assert_same_weights(root / "out", tmp_path / "out")
    assert losses_of(tmp_path / "out") == losses_of(root / "out")


def test_weights_that_stream_from_a_file_survive_kills_and_the_model_on_disk_is_whole(
    undisturbed, launcher, tmp_path
):
    root, run = undisturbed
    model = root / "model" / "model.safetensors"
    before = model.read_bytes()
    run = [*run, "--weights", "stream", "--update-on", "device", "--weights-dir", tmp_path / "pages"]
    log = tmp_path / "log"
    assert launcher.run([*run, "--out", tmp_path / "whole", "--quiet"], log) == 0, log.read_text()
    kills = kill_and_resume(launcher, run, tmp_path / "out", [(0.3, 0.02), (0.4, 0.0)], log)
    assert any(kill["killed"] for kill in kills)
    assert model.read_bytes() == before
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "whole")


def test_same_command_twice_ends_bit_identical(undisturbed):
    root, _ = undisturbed
    assert_same_weights(root / "out", root / "warm")


def test_killed_while_saving_leaves_the_checkpoints_before_it(undisturbed, launcher, tmp_path):
    root, run = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    process = launcher.start([*run, "--out", out], log)
    staged = out / "checkpoints" / ".saving-checkpoint-9"
    while not staged.exists() and process.exitcode is None:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = [path.name for path in complete_checkpoints(out / "checkpoints")]
    assert "checkpoint-6" in names
    assert launcher.run(["finetune", "--resume", "--out", out], log) == 0, log.read_text()
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    assert_same_weights(root / "out", out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_resumed_run_ends_bit_identical(undisturbed, launcher, tmp_path, number):
    root, run = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    process = launcher.start([*run, "--out", out], log)
    while len(losses_of(out) if (out / "metrics.jsonl").exists() else []) < 8 and process.exitcode is None:
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    last = losses_of(out)[-1][0]
    assert complete_checkpoints(out / "checkpoints")[-1].name == f"checkpoint-{last}"
    assert f"chunkft finetune --resume --out {out}" in log.read_text()
    assert not (out / "model.safetensors").exists()
    assert launcher.run(["finetune", "--resume", "--out", out], log) == 0, log.read_text()
    assert_same_weights(root / "out", out)


def test_resuming_a_finished_run_changes_nothing(undisturbed, launcher, tmp_path):
    root, run = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    assert launcher.run([*run, "--out", out], log) == 0
    assert launcher.run(["finetune", "--resume", "--out", out], log) == 0, log.read_text()
    assert_same_weights(root / "out", out)
    assert losses_of(out) == losses_of(root / "out")


def test_full_disk_leaves_the_old_checkpoint_and_names_path_and_bytes(undisturbed, launcher, tmp_path):
    root, run = undisturbed
    out = tmp_path / "out"
    largest = max(
        path.stat().st_size for path in (root / "out" / "checkpoints" / f"checkpoint-{FAULT_STEPS}").iterdir()
    )
    assert launcher.run([*run, "--out", out, "--steps", "6"], tmp_path / "log") == 0
    before = {path.name: path.read_bytes() for path in (out / "checkpoints" / "checkpoint-6").iterdir()}

    def few_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    failed = run_command("finetune", "--resume", "--out", out, "--steps", FAULT_STEPS, preexec_fn=few_bytes)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert str(out / "checkpoints" / "checkpoint-9") in failed.stderr
    assert "bytes" in failed.stderr
    assert os.strerror(errno.EFBIG) in failed.stderr
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    assert {
        path.name: path.read_bytes() for path in (out / "checkpoints" / "checkpoint-6").iterdir()
    } == before
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    assert launcher.run(["finetune", "--resume", "--out", out], tmp_path / "log") == 0


def test_resumed_run_may_have_other_chunks(undisturbed, launcher, tmp_path):
    _, run = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    assert launcher.run([*run, "--out", out, "--steps", "6"], log) == 0
    assert launcher.run(["finetune", "--resume", "--out", out, "--steps", "12", "--chunks", "3"], log) == 0, (
        log.read_text()
    )
    assert [step for step, _ in losses_of(out)][-1] == 12
    assert json.loads((out / "run.json").read_text())["settings"]["chunks"] == 3


def make_checkpoint(root, step, content=b"whole"):
    with staging(root, f"checkpoint-{step}") as aside:
        (aside / "checkpoint").mkdir()
        (aside / "checkpoint" / "weights").write_bytes(content)
        publish(aside / "checkpoint", root / f"checkpoint-{step}")


def fail_after_five_bytes(root, name):
    with staging(root, name) as aside, writing(root / name, aside, 4321):
        (aside / "weights").write_bytes(b"12345")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_failed_write_is_told_with_path_and_bytes_and_leaves_the_rest(tmp_path):
    make_checkpoint(tmp_path, 1)
    with pytest.raises(CheckpointWriteError) as caught:
        fail_after_five_bytes(tmp_path, "checkpoint-2")
    target = tmp_path / "checkpoint-2"
    message = str(caught.value)
    assert all(part in message for part in (str(target), "No space left on device", "5 bytes", "4,321"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_publishing_again_replaces_the_directory(tmp_path):
    make_checkpoint(tmp_path, 3, b"old")
    make_checkpoint(tmp_path, 3, b"new")
    assert (tmp_path / "checkpoint-3" / "weights").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_clean_up_removes_halves_and_puts_back_what_was_not_replaced(tmp_path):
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".replaced-checkpoint-2")
    for half in (".saving-checkpoint-3", ".deleted-checkpoint-0", ".replaced-checkpoint-1"):
        (tmp_path / half).mkdir()
    removed = clean_up(tmp_path)
    assert {path.name for path in removed} == {
        ".saving-checkpoint-3",
        ".deleted-checkpoint-0",
        ".replaced-checkpoint-1",
    }
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_checkpoints_are_ordered_by_step_and_the_oldest_deleted(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    rotate(tmp_path, 1, protected=tmp_path / "checkpoint-10")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    rotate(tmp_path, None)
    assert len(complete_checkpoints(tmp_path)) == 2


def test_command_runs_in_a_process_of_its_own():
    import subprocess

    done = subprocess.run(command("--help"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "finetune" in done.stdout
