"""What the tests of the command line share: tiny models with byte tokenizers, and running the command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

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
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer(**options).save_pretrained(path)
    return path


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
    BertForMaskedLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


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
