"""Every Python block of README and docs runs, and every command in them exists."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from nsight import check_nsight
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig, LlamaForCausalLM

from chunkft.cli.arguments import parse

ROOT = Path(__file__).parent.parent
OPTIONAL = {"datasets", "lightning", "trl"}  # of pages on trainers
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(language: str) -> list[pytest.param]:
    found = []
    for page in PAGES:
        for number, match in enumerate(
            re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)
        ):
            found.append(pytest.param(match[1], id=f"{page.name}-{number}"))
    return found


@pytest.fixture
def names() -> dict[str, object]:
    """What the pages take for granted: a causal language model and batches for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=128
    )
    ids = torch.randint(0, 128, (3, 2, 12))
    return {
        "model": LlamaForCausalLM(config),
        "loader": [{"input_ids": i, "labels": i} for i in ids],
        "logits": torch.randn(24, 128, requires_grad=True),
        "labels": torch.randint(0, 128, (24,)),
    }


@contextmanager
def _one_rank(code: str, folder: Path) -> Iterator[None]:
    """A block that speaks of ranks runs as the only one of them."""
    if "torch.distributed" not in code and "token_mean" not in code:
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, place):
        if "init_process_group" not in code:
            dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_block_runs(
    code: str, names: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    if missing := sorted(name for name in imported & OPTIONAL if importlib.util.find_spec(name) is None):
        pytest.skip(f"the page needs {', '.join(missing)}, which is not installed")
    monkeypatch.chdir(tmp_path)
    if "runs/first" in code:  # what the tutorial's first command leaves
        shutil.copytree(ROOT / "chunkft" / "data" / "tiny-llama-bytes", tmp_path / "runs" / "first")
    with _one_rank(code, tmp_path):
        exec(compile(code, "page", "exec"), names)


def _commands() -> list[pytest.param]:
    commands = []
    for block in _blocks("bash"):
        text = block.values[0].replace("\\\n", " ")
        commands += [pytest.param(line, id=line[:60]) for line in text.splitlines() if line.strip()]
    return commands


@functools.cache
def _help(*script: str) -> tuple[int, str]:
    """Exit status and errors of ``python SCRIPT --help``."""
    ran = subprocess.run(
        [sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ran.returncode, ran.stderr


@pytest.mark.parametrize("line", _commands())
def test_command_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        shown = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
        assert targets
    elif words[0] in ("nsys", "ncu"):
        started = check_nsight(words)
        assert not started or started[0] == "chunkft"
        if started:
            parse(started[1:])
    elif words[0] == "chunkft":
        parse(words[1:])
    elif words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        if launched.module:
            assert launched.training_script == "chunkft"
            parse(launched.training_script_args)
        else:
            assert (ROOT / launched.training_script).is_file(), f"{launched.training_script} does not exist"
    elif words[0] == "python":
        script = words[2] if words[1] == "-m" else words[1]
        file = ROOT / (script.replace(".", "/") + ".py" if words[1] == "-m" else script)
        assert file.is_file(), f"{file} does not exist"
        status, said = _help(*words[1 : 3 if words[1] == "-m" else 2])
        assert status == 0, said
    else:
        assert words[0] in ("pip", "cd"), f"no rule checks {words[0]!r}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
