"""Peer methods from PyPI, each configured as its own documentation recommends."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def adamw(model: nn.Module, lr: float, weight_decay: float, fused: bool = True) -> torch.optim.Optimizer:
    """Full fine-tuning with `torch.optim.AdamW`."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)


def equal_blocks(names: Sequence[str], count: int) -> list[list[str]]:
    """BAdam's block list: `names` in order, cut into `count` runs of an equal number of names.

    Raises ValueError where count is not in 1..len(names).
    """
    if not 1 <= count <= len(names):
        raise ValueError(f"count={count}: allowed are 1 to {len(names)}, the number of names")
    edges = [round(i * len(names) / count) for i in range(count + 1)]
    return [list(names[a:b]) for a, b in itertools.pairwise(edges)]


def bert_blocks(model: nn.Module, count: int) -> list[list[str]]:
    """BAdam's blocks of a BERT encoder: the four parts of each layer, bottom up, in `count` runs.

    BAdam's default leaves the embeddings frozen; the head is trained through `active_modules`.
    """
    prefixes = []
    for i in range(model.config.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        prefixes += [
            layer + part for part in ("attention.self.", "attention.output.", "intermediate.", "output.")
        ]
    return equal_blocks(prefixes, count)


def llama_blocks(model: nn.Module, count: int) -> list[list[str]]:
    """BAdam's blocks of a Llama: embedding, attention and MLP of each layer with their norms, head."""
    names = ["model.embed_tokens."]
    for i in range(model.config.num_hidden_layers):
        names += [f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."]
    blocks = equal_blocks(names, count)
    for block in blocks:
        block += [n.replace("self_attn.", "input_layernorm.") for n in block if "self_attn." in n]
        block += [n.replace("mlp.", "post_attention_layernorm.") for n in block if "mlp." in n]
    blocks[-1] += ["model.norm.", "lm_head."]
    return blocks


def badam(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    blocks: list[list[str]],
    interval: int,
    active_modules: Sequence[str] = (),
    order: str = "random",
    fused: bool = True,
) -> torch.optim.Optimizer:
    """BAdam over AdamW; `active_modules` train at every step, as its README advises for new heads."""
    from badam import BlockOptimizer, block_optim

    block_optim.print_rank_0 = lambda *args, **kwargs: (
        None
    )  # it prints the block at every switch, verbose=0 or not
    base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BlockOptimizer(
            base_optimizer=base,
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=blocks,
            switch_block_every=interval,
            switch_mode=order,
            active_modules=list(active_modules),
            verbose=0,
        )


def galore(
    model: nn.Module, lr: float, weight_decay: float, rank: int = 8, gap: int = 200, scale: float = 4.0
) -> torch.optim.Optimizer:
    """GaLore's AdamW: attention and feed-forward matrices projected to `rank`, everything else dense.

    Rank 8 and scale 4 are those of the paper's GLUE runs (arXiv 2403.03507, appendix D).
    """
    from galore_torch import GaLoreAdamW

    low = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n]
    ids = {id(p) for p in low}
    dense = [p for p in model.parameters() if id(p) not in ids]
    projected: dict[str, Any] = {
        "params": low,
        "rank": rank,
        "update_proj_gap": gap,
        "scale": scale,
        "proj_type": "std",
    }
    return GaLoreAdamW(
        [{"params": dense}, projected], lr=lr, weight_decay=weight_decay, no_deprecation_warning=True
    )


def lora_fa(
    model: nn.Module, lr: float, weight_decay: float, rank: int = 8, alpha: int = 16
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """PEFT's LoRA-FA on every linear layer, classification head trained; returns the wrapped model too."""
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.optimizers import create_lorafa_optimizer

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    wrapped = get_peft_model(model, config)
    optimizer = create_lorafa_optimizer(wrapped, r=rank, lora_alpha=alpha, lr=lr, weight_decay=weight_decay)
    return wrapped, optimizer
