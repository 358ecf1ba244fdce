"""Runs the command on several ranks under the agent of torchrun, in processes that are forked ready to run."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clitools import Launcher, losses_of_killed

LIMIT = 120
PRELOADED = ("chunkft.cli.run", "chunkft.cli.demo", "datasets", "tokenizers")
NEEDED_BY_RANKS = (
    "torch.distributed.launcher.api",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_main(arguments: list[str], folder: str, before: Callable[[], None] | None) -> int:
    """What each rank does: leaves its process id in `folder`, calls `before`, and runs the command."""
    import torch

    from chunkft.cli import main

    torch.set_num_threads(1)
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    (Path(folder) / f"{rank}.{attempt}.pid").write_text(str(os.getpid()))
    if before is not None:
        before()
    status = main(arguments)
    (Path(folder) / f"{rank}.{attempt}.status").write_text(str(status))
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    return status


def agent_main(
    ranks: int, restarts: int, arguments: list[str], folder: str, before: Callable[[], None] | None
) -> None:
    """Is torchrun: starts the ranks by torch's elastic agent; output goes to the file `log` in `folder`."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    descriptor = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=restarts,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="test",
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, rank_main)(arguments, folder, before)
    except BaseException as error:
        print(f"torchrun: {type(error).__name__}", flush=True)
        os._exit(1)


class RankLauncher(Launcher):
    """A launcher that has also imported what several ranks need."""

    def __init__(self) -> None:
        super().__init__()
        self._context.set_forkserver_preload([*PRELOADED, *NEEDED_BY_RANKS])


class Ranks:
    """A run of the command on several ranks, in `folder`."""

    def __init__(
        self,
        launcher: Launcher,
        folder: Path,
        ranks: int,
        arguments: list[object],
        restarts: int = 0,
        before: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process: Any = launcher._context.Process(
            target=agent_main, args=(ranks, restarts, [*map(str, arguments)], str(folder), before)
        )
        self.process.start()

    @property
    def log(self) -> str:
        """All that the ranks and the agent printed."""
        return (self.folder / "log").read_text()

    def wait(self) -> int:
        """The exit status of the agent; kills everything and fails after two minutes."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            for file in self.folder.glob("*.pid"):
                try:
                    os.kill(int(file.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.kill()
            raise AssertionError(f"the ranks did not end:\n{self.log[-3000:]}")
        return int(self.process.exitcode)

    def until_step(self, out: Path, step: int) -> None:
        """Waits until metrics.jsonl has a step."""
        end = time.monotonic() + LIMIT
        while max(losses_of_killed(out), default=0) < step:
            assert self.process.exitcode is None, self.log[-3000:]
            assert time.monotonic() < end, self.log[-3000:]
            time.sleep(0.005)

    def pid(self, rank: int, attempt: int = 0) -> int:
        """The process of a rank."""
        return int((self.folder / f"{rank}.{attempt}.pid").read_text())

    def statuses(self, attempt: int = 0) -> dict[int, int]:
        """What the command returned, by rank."""
        files = self.folder.glob(f"*.{attempt}.status")
        return {int(file.name.partition(".")[0]): int(file.read_text()) for file in files}
