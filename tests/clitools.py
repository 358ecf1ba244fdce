"""What the tests of the command line share: tiny models with byte tokenizers, and running the command."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="the command reads data with the package datasets, which is not installed",
)
ROOT = Path(__file__).resolve().parent.parent
PAD, END, BEGIN = 0, 1, 2
SPECIALS = ("<pad>", "<end>", "<begin>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, begin: bool = False, chat_template: str | None = None) -> Any:
    """A tokenizer with one token a byte: ids 0 to 2 are special, byte b is some id from 3 to 258."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", BEGIN)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<begin>" if begin else None,
    )
    if chat_template is not None:
        made.chat_template = chat_template
    return made


def save(model: Any, tokenizer: Any, path: Path) -> Path:
    """Writes a model directory without a word."""
    from chunkft.cli.models import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def save_tiny_llama(path: Path, seed: int = 0, dropout: float = 0.0, **options: Any) -> Path:
    """Writes a random Llama of about 35,000 parameters with a byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=dropout,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return save(LlamaForCausalLM(config), byte_tokenizer(**options), path)


def save_tiny_bert(path: Path, seed: int = 0) -> Path:
    """Writes a random BERT masked language model with a byte tokenizer: an encoder, so not causal."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
    )
    return save(BertForMaskedLM(config), byte_tokenizer(), path)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Writes one JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(path: Path, count: int) -> Path:
    """Writes `count` prompt/completion lines of varying length."""
    rows = [{"prompt": f"{a}+{a * 7 % 31} is", "completion": f" {a + a * 7 % 31}"} for a in range(count)]
    return write_jsonl(path, rows)


def command(*arguments: object) -> list[str]:
    """The command line that runs chunkft in a process of its own."""
    return [sys.executable, "-m", "chunkft", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of such a process: this source tree, one thread, no network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs chunkft in a process of its own and waits for it."""
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, check=False, **options
    )


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory."""
    from safetensors.torch import load_file

    return load_file(str(path / "model.safetensors"))


def assert_same_weights(one: Path, other: Path) -> None:
    """Fails unless two model directories hold bit-identical tensors of the same names."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[0]}"


def run_main(arguments: list[str], log: str | None = None) -> None:
    """Runs the command in this process, one thread, its output into the file `log`, and exits with its
    status.
    """
    from chunkft.cli import main

    torch.set_num_threads(1)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    sys.exit(main(arguments))


class Launcher:
    """Starts the command in processes forked from one that has imported everything, so that a start takes a
    moment.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["chunkft.cli.run", "chunkft.cli.demo", "datasets", "tokenizers"]
        )

    def start(self, arguments: list[object], log: Path) -> Any:
        """Starts the command; the process has `pid`, `join` and `exitcode`."""
        process = self._context.Process(target=run_main, args=([*map(str, arguments)], str(log)))
        process.start()
        return process

    def run(self, arguments: list[object], log: Path) -> int:
        """Runs the command to its end and returns its exit status."""
        process = self.start(arguments, log)
        process.join()
        return int(process.exitcode)


FAULT_STEPS = 36


def fault_run(root: Path) -> list[object]:
    """A run that everything random is in: dropout, shuffled epochs, accumulation, a random order of chunks,
    saves.
    """
    model = root / "model"
    if not model.exists():
        save_tiny_llama(model, dropout=0.1)
        sums(root / "train.jsonl", 40)
        sums(root / "held-out.jsonl", 8)
    options = {
        "model": model,
        "data": root / "train.jsonl",
        "eval-data": root / "held-out.jsonl",
        "eval-every": 9,
        "steps": FAULT_STEPS,
        "save-every": 3,
        "chunks": 4,
        "interval": 2,
        "schedule": "random",
        "batch-size": 4,
        "grad-accum": 2,
        "seq-len": 32,
        "lr": 1e-2,
        "device": "cpu",
    }
    return ["finetune", *(part for name, value in options.items() for part in (f"--{name}", value))]


def losses_of(path: Path) -> list[tuple[int, float]]:
    """Step and loss of every record of metrics.jsonl, evaluations included."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record.get("loss", record.get("eval_loss"))) for record in records]


def kill_and_resume(
    launcher: Launcher, run: list[object], out: Path, moments: list[tuple[float, float]], log: Path
) -> list[dict[str, Any]]:
    """Kills a run with SIGKILL at each moment, resumes it every time, and lets the last one finish.

    A moment is (part, seconds): when this part, 0 to 1, of the steps that are left is done, and so much
    later.
    Returns a record of every kill: how far the run was, and what lay in its directory.
    """
    kills = []
    started = False
    for part, seconds in moments:
        done = max(losses_of_killed(out), default=0)
        process = launcher.start(
            [*run, "--out", out] if not started else ["finetune", "--resume", "--out", out], log
        )
        target = done + part * (FAULT_STEPS - done)
        while process.exitcode is None and max(losses_of_killed(out), default=0) < target:
            time.sleep(0.002)
        process.join(seconds)
        alive = process.exitcode is None
        if alive:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        checkpoints = out / "checkpoints"
        here = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
        kills.append({"killed": alive, "step": max(losses_of_killed(out), default=0), "found": here})
        started = (out / "run.json").exists()
        if not started:
            shutil.rmtree(out, ignore_errors=True)
    status = launcher.run(["finetune", "--resume", "--out", out] if started else [*run, "--out", out], log)
    if status != 0:
        raise AssertionError(f"the resumed run ended with status {status}:\n{log.read_text()[-3000:]}")
    return kills


def losses_of_killed(path: Path) -> list[int]:
    """The steps in a metrics.jsonl whose last line may be cut off."""
    file = path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["step"] for line in lines]
