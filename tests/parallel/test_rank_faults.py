"""What happens to one rank ends the others with a clear error in time, or all go on and stay alike."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import rank_fault_rigs as faults
from pool import Failure, fresh_pool
from rank_fault_rigs import FAULTS, KINDS, OTHERS, VICTIM, WHEN

TIMEOUT = 4.0  # of a collective, in seconds
CASES = [(kind, fault) for fault in (*FAULTS, *OTHERS) for kind in KINDS]


def suffer(case):
    with fresh_pool(2, collective_timeout=TIMEOUT) as pool:
        return pool.outcomes(2, faults.train_until, *case, timeout=40.0)


@pytest.fixture(scope="module")
def suffered():
    """What each rank tells of each case; they run side by side, since most of the time they wait."""
    with ThreadPoolExecutor(6) as pools:
        yield {case: pools.submit(suffer, case) for case in CASES}


@pytest.mark.parametrize(("kind", "fault"), CASES, ids=str)
def test_a_rank_that_fails_ends_the_others_in_time(suffered, kind, fault):
    outcomes = suffered[kind, fault].result()
    victim, survivor = outcomes[VICTIM], outcomes[1 - VICTIM]
    assert isinstance(victim, Failure)
    expected = {
        "killed": "died",
        "interrupted": "KeyboardInterrupt",
        "cannot": "OSError",
        "raises": "ZeroDivisionError",
        "leaves": "StopIteration",
        "goes": "RuntimeError",
        "loads": "RuntimeError",
    }[fault.split()[0]]
    assert victim.kind == ("ValueError" if "construction" in fault else expected), str(victim)
    assert survivor.kind == "RuntimeError", str(survivor)
    if kind == "replicas":  # collectives of FSDP2 fail with torch's own words
        assert "a process of the group did not take part" in survivor.message
        assert "The backend says: " in survivor.message
        where = "communicator" if "construction" in fault else f" in step {WHEN + 1 + after_step(fault)}:"
        assert where in survivor.message
        assert "was the direct cause of the following exception" in survivor.details
    if "construction" not in fault:
        assert "detached" in survivor.details
        waited = float(survivor.details.split("waited ")[1].split(" s")[0])
        assert waited < TIMEOUT + 4.0


def after_step(fault):
    """What fails behind the last collective of a step is seen in the next one."""
    return int(fault in ("cannot rest state", "raises in schedule"))


SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import chunkft
rank = 1 - (os.fork() > 0)
if rank:
    print(os.getpid(), flush=True)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2,
                        timeout=timedelta(seconds=3))
model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Linear(12, 3))
optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, process_group="default")
for step in range(3):
    if step == 2 and rank:
        time.sleep(60)
    model(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
"""


def test_a_process_ends_after_the_error_while_the_other_is_there(tmp_path):
    said = tmp_path / "said"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    with said.open("w") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        other = int(process.stdout.readline())
        try:
            assert process.wait(timeout=50) == 1
            os.kill(other, 0)
        finally:
            os.kill(other, signal.SIGKILL)
            process.kill()
    assert "reducing gradients in step 3: a process of the group did not take part" in said.read_text()
