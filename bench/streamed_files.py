"""Host memory of loading and saving a model: chunkft's way and transformers', each in a fresh process.

python -m bench.streamed_files    a random Llama of 200 MB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import common

OUT = common.RESULTS / "streamed-files-cpu.json"
MIB = 1 << 20
# Beside the model and what the process had before.
ALLOWED = 64 * MIB
# Blocks of 1 MiB and more come from mmap and go back when freed: the process peak follows live tensors.
CHILD_ENV = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
ACTIONS = (
    *("load_streamed", "load_converted", "from_pretrained", "from_pretrained_then_copied"),
    *("save_streamed", "save_pretrained", "load_and_save"),
)


def make_model(directory: Path, megabytes: int, seed: int) -> None:
    """Saves a random Llama in bf16 whose weights are about `megabytes` MB."""
    import transformers

    torch.manual_seed(seed)
    hidden = 512
    layers = max(1, megabytes * 1_000_000 // (2 * 16 * hidden * hidden))
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def place_in_memory(model: nn.Module) -> None:
    """Gives the parameters of a model on the meta device host memory, every page of which is touched."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                memory = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(memory, parameter.requires_grad)


def copy_to_memory(model: nn.Module) -> nn.Module:
    """Moves the weights of a loaded model, which are maps of its files, into host memory, one after the other."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter).copy_(parameter.data)
    return model


def status(field: str) -> int:
    """A figure of this process in bytes: VmRSS, or VmHWM, its highest so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field} line; peak memory needs Linux")


def measure(action: str, directory: Path, out: Path) -> dict[str, Any]:
    """Does one of ACTIONS and returns bytes: of the model, before, at the peak, and beside the model."""
    import transformers

    from chunkft.integrations.streamed import load_streamed, save_streamed

    transformers.utils.logging.disable_progress_bar()
    model: Any = None
    saves = action.startswith("save")

    def load_and_save() -> Any:
        loaded = load_streamed(directory, place=place_in_memory)
        save_streamed(loaded, out)
        return loaded

    if saves:
        model = load_streamed(directory, place=place_in_memory)
    else:  # what building a model imports is no part of loading it
        config = transformers.AutoConfig.from_pretrained(directory)
        config.num_hidden_layers = 1
        transformers.AutoModelForCausalLM.from_config(config)
    work: dict[str, Callable[[], Any]] = {
        "load_streamed": lambda: load_streamed(directory, place=place_in_memory),
        "load_converted": lambda: load_streamed(directory, place=place_in_memory, dtype=torch.float32),
        "from_pretrained": lambda: transformers.AutoModelForCausalLM.from_pretrained(directory),
        "from_pretrained_then_copied": lambda: copy_to_memory(
            transformers.AutoModelForCausalLM.from_pretrained(directory)
        ),
        "load_and_save": load_and_save,
        "save_streamed": lambda: save_streamed(model, out, max_shard_bytes=64_000_000),
        "save_pretrained": lambda: model.save_pretrained(out, max_shard_size="64MB"),
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    start = time.perf_counter()
    result = work[action]()
    seconds = time.perf_counter() - start
    peak = status("VmHWM")
    model = model if saves else result
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    beside = peak - before - (0 if saves else size)
    return {"model": size, "before": before, "peak": peak, "beside_model": beside, "seconds": seconds}


def in_fresh_process(action: str, directory: Path, out: Path, threads: int) -> dict[str, Any]:
    """`measure` in a process of its own; raises CalledProcessError where it fails."""
    module = f"{common.PACKAGE}.streamed_files"
    command = [sys.executable, "-m", module, "--child", action, str(directory), str(out)]
    environment = {**os.environ, **CHILD_ENV, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=common.REPO
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(megabytes: int, threads: int, seed: int, actions: Sequence[str] = ACTIONS) -> list[dict[str, Any]]:
    """Measures each action on a model of that size, prints a line each, and returns the records."""
    records = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_model(root / "model", megabytes, seed)
        for action in actions:
            found = in_fresh_process(action, root / "model", root / f"out-{action}", threads)
            records.append({"action": action, **found})
            print(
                f"{action:27} model {found['model'] / MIB:7.1f} MiB  beside it {found['beside_model'] / MIB:7.1f} MiB"
                f"  {found['seconds']:6.2f} s",
                flush=True,
            )
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `--megabytes N`, `--threads N`, `--seed N`, `--out FILE`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        action, directory, out = given.child
        print(json.dumps(measure(action, Path(directory), Path(out))))
        return
    records = run(given.megabytes, given.threads, given.seed)
    result = {
        **common.header(given.seed),
        "megabytes": given.megabytes,
        "allowed": ALLOWED,
        "records": records,
    }
    common.write_json(given.out, result)


if __name__ == "__main__":
    main()
