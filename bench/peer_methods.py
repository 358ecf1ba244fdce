"""Every method of `bench.peer_bench` on the plain Llama, configured as its own documentation recommends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import peers
from .plain_llama import PlainLlama

Advance = Callable[[Tensor], Tensor]  # one training step on token ids (B, T + 1); returns the loss
Make = Callable[[PlainLlama, float], Advance]
BADAM_INTERVAL = 10
LINEAR = ["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class Method:
    """How to train with a method: its package, whether it needs a GPU, and what its settings are in words."""

    make: Make
    settings: str
    package: str | None = None
    gpu: bool = False


def stepping(model: nn.Module, optimizer: Any) -> Advance:
    """An ordinary step: backward, step, zero_grad."""

    def advance(ids: Tensor) -> Tensor:
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return advance


def plain(make: Callable[[PlainLlama, float], Any]) -> Make:
    """From what makes an optimizer."""
    return lambda model, lr: stepping(model, make(model, lr))


def chunk(**options: Any) -> Make:
    """chunkft with these options."""

    def make(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
        import chunkft

        return chunkft.ChunkAdamW(model, lr=lr, weight_decay=0.0, **options)

    return plain(make)


def projected_groups(model: PlainLlama, **options: Any) -> list[dict[str, Any]]:
    """Groups of GaLore and APOLLO: matrices of attention and MLP in low rank, everything else dense."""
    low = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    ids = {id(p) for p in low}
    return [{"params": [p for p in model.parameters() if id(p) not in ids]}, {"params": low, **options}]


def badam(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
    """A block for each layer, one for embedding and one for the head, as its README does for Llama."""
    blocks = [["table."], *([f"blocks.{i}."] for i in range(len(model.blocks))), ["norm.", "lm_head."]]
    return peers.badam(model, lr, 0.0, blocks, BADAM_INTERVAL, order="random")


def galore(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    groups = projected_groups(
        model, rank=model.table.embedding_dim // 4, update_proj_gap=200, scale=0.25, proj_type="std"
    )
    return GaLoreAdamW(groups, lr=lr, no_deprecation_warning=True)


def apollo(mini: bool) -> Callable[[PlainLlama, float], torch.optim.Optimizer]:
    def make(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
        from apollo_torch import APOLLOAdamW

        rank, scale, kind = (1, 128, "tensor") if mini else (model.table.embedding_dim // 4, 1, "channel")
        groups = projected_groups(
            model,
            rank=rank,
            proj="random",
            scale_type=kind,
            scale=scale,
            update_proj_gap=200,
            proj_type="std",
        )
        return APOLLOAdamW(groups, lr=lr)

    return make


def lora(fa: bool) -> Make:
    def make(model: PlainLlama, lr: float) -> Advance:
        from peft import LoraConfig, get_peft_model
        from peft.optimizers import create_lorafa_optimizer

        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEAR)
        wrapped = get_peft_model(model, config)
        if fa:
            return stepping(wrapped, create_lorafa_optimizer(wrapped, r=8, lora_alpha=16, lr=lr))
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        return stepping(wrapped, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0))

    return make


def adam_mini(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    heads = model.table.embedding_dim // model.head
    kv = model.blocks[0].k.out_features // model.head
    optimizer = Adam_mini(
        model.named_parameters(),
        lr=lr,
        dim=model.table.embedding_dim,
        n_heads=heads,
        n_kv_heads=kv,
        verbose=False,
    )
    # Its README: names that differ from those it knows are added to its sets.
    optimizer.embd_names.add("table")
    optimizer.wqk_names |= {".q.weight", ".k.weight"}
    optimizer.wv_names.add(".v.weight")
    optimizer.attn_proj_names.add(".o.weight")
    optimizer.mlp_names |= {"gate.weight", "up.weight", "down.weight"}
    return optimizer


def bitsandbytes(name: str) -> Callable[[PlainLlama, float], torch.optim.Optimizer]:
    def make(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        return getattr(optim, name)(model.parameters(), lr=lr, weight_decay=0.0)

    return make


def torchao(name: str) -> Callable[[PlainLlama, float], torch.optim.Optimizer]:
    def make(model: PlainLlama, lr: float) -> torch.optim.Optimizer:
        from torchao import optim

        return getattr(optim, name)(model.parameters(), lr=lr, weight_decay=0.0)

    return make


def torchao_offload(model: PlainLlama, lr: float) -> Any:
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=lr, fused=True, weight_decay=0.0)


def lomo(name: str) -> Make:
    def make(model: PlainLlama, lr: float) -> Advance:
        import lomo_optim

        optimizer = getattr(lomo_optim, name)(model, lr=lr)

        def advance(ids: Tensor) -> Tensor:
            loss = model(ids)
            optimizer.fused_backward(loss, lr)
            return loss.detach()

        return advance

    return make


def deepspeed(model: PlainLlama, lr: float) -> Advance:
    import deepspeed as library

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0}},
    }
    engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=config)

    def advance(ids: Tensor) -> Tensor:
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return advance


def trainstream(model: PlainLlama, lr: float) -> Advance:
    import trainstream as library

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return stepping(*library.wrap(model, optimizer))


def roundpipe(model: PlainLlama, lr: float) -> Advance:
    raise NotImplementedError("no adapter: it trains models that are cut into the stages of its pipeline")


METHODS: dict[str, Method] = {
    "AdamW": Method(plain(lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0)), "full"),
    "AdamW fused": Method(plain(lambda m, lr: peers.adamw(m, lr, 0.0)), "full, fused=True"),
    "chunkft K=4": Method(chunk(chunks=4, interval=1), "K=4, T=1"),
    "chunkft K=16": Method(chunk(chunks=16, interval=1), "K=16, T=1"),
    "chunkft backward K=1": Method(
        chunk(chunks=1, interval=1, residency="stream", update="backward", page_bytes=1 << 20),
        "full AdamW, state streamed, update in backward",
    ),
    "BAdam": Method(plain(badam), f"a block a layer, switch every {BADAM_INTERVAL}", "badam"),
    "GaLore": Method(plain(galore), "rank d/4, gap 200, scale 0.25", "galore-torch"),
    "APOLLO": Method(plain(apollo(mini=False)), "rank d/4, channel, gap 200", "apollo-torch"),
    "APOLLO-Mini": Method(plain(apollo(mini=True)), "rank 1, tensor, scale 128, gap 200", "apollo-torch"),
    "LoRA": Method(lora(fa=False), "rank 8, alpha 16, all linear layers of the blocks", "peft"),
    "LoRA-FA": Method(lora(fa=True), "rank 8, alpha 16, all linear layers of the blocks", "peft"),
    "Adam-mini": Method(plain(adam_mini), "blocks by head and row", "adam-mini"),
    "8-bit AdamW": Method(plain(bitsandbytes("AdamW8bit")), "bitsandbytes AdamW8bit", "bitsandbytes"),
    "paged 8-bit AdamW": Method(
        plain(bitsandbytes("PagedAdamW8bit")), "bitsandbytes PagedAdamW8bit", "bitsandbytes", gpu=True
    ),
    "torchao 8-bit": Method(plain(torchao("AdamW8bit")), "torchao AdamW8bit", "torchao"),
    "torchao 4-bit": Method(plain(torchao("AdamW4bit")), "torchao AdamW4bit", "torchao"),
    "torchao CPUOffload": Method(plain(torchao_offload), "fused AdamW on the host", "torchao", gpu=True),
    "LOMO": Method(lomo("Lomo"), "SGD in backward", "lomo-optim"),
    "AdaLomo": Method(lomo("AdaLomo"), "in backward", "lomo-optim"),
    "ZeRO-Offload": Method(deepspeed, "ZeRO 2, optimizer on the host", "deepspeed", gpu=True),
    "TrainStream": Method(trainstream, "wrap() with its defaults", "trainstream", gpu=True),
    "RoundPipe": Method(roundpipe, "", "roundpipe", gpu=True),
}
