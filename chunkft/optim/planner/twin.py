"""A copy of a model without memory, and a shallow one whose blocks stand for all that are equal to them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.partitions import block_prefixes
from chunkft.plan import uncompiled

__all__ = ["Shallow", "Step", "empty_model", "language_model_step", "meta_twin", "shallow_twin"]

Step = Callable[[nn.Module, int, int], Tensor]  # model on the meta device, batch, tokens; the loss
PLAIN = (int, float, str, bool, type(None), torch.dtype)
NUMBERS = {"layer_idx", "layer_id", "layer_index"}


@dataclass(frozen=True)
class Shallow:
    """A model with two blocks of each kind: others keep the input of the first alive, as a rule, and of no second.

    Attributes:
        model: on the meta device.
        blocks: names of its blocks.
        kinds: for each block of the deep model, which of ``blocks`` is like it.
        deep: names of the blocks of the deep model.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    kinds: tuple[int, ...]
    deep: tuple[str, ...]


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model of a configuration of transformers, on the meta device.

    Raises:
        TypeError: if it is no such configuration.
        ValueError: if there is no causal language model of it.
    """
    # The package that the configuration is from is there already; chunkft does not ask for it by itself.
    package = importlib.import_module(type(config).__module__.partition(".")[0])
    factory = getattr(package, "AutoModelForCausalLM", None)
    if factory is None or not hasattr(config, "model_type"):
        raise TypeError(
            f"model_or_config must be a torch.nn.Module or a configuration of transformers, got {type(config).__name__}"
        )
    with torch.device("meta"):
        built: nn.Module = factory.from_config(config, dtype=dtype)
    return built.train()


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of a module on the meta device; parameters and buffers are not copied, what ties them is."""
    model = uncompiled(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin.train()


def shallow_twin(model: nn.Module) -> Shallow:
    """A copy of a model on the meta device with two blocks of each kind; all of it where there is no list of blocks."""
    names = [prefix.removesuffix(".") for prefix in block_prefixes(model, (nn.ModuleList,))]
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) != 1:
        return Shallow(meta_twin(model), (), (), ())
    (path,) = parents
    blocks = [model.get_submodule(name) for name in names]
    signatures = [_signature(block) for block in blocks]
    places: dict[Any, list[int]] = {}
    for index, signature in enumerate(signatures):
        places.setdefault(signature, []).append(index)
    kept = sorted(index for found in places.values() for index in found[:2])
    like = [index if index in kept else places[s][1] for index, s in enumerate(signatures)]
    owner, _, attribute = path.rpartition(".")
    holder = model.get_submodule(owner)
    deep = holder._modules[attribute]
    try:
        holder._modules[attribute] = nn.ModuleList([blocks[index] for index in kept])
        twin = meta_twin(model)
    finally:
        holder._modules[attribute] = deep
    kinds = tuple(kept.index(index) for index in like)
    return Shallow(twin, tuple(f"{path}.{i}" for i in range(len(kept))), kinds, tuple(names))


def language_model_step(model: nn.Module, batch: int, tokens: int) -> Tensor:
    """The loss of a causal language model, as ``model(input_ids=..., labels=...).loss``.

    Raises:
        ValueError: if it cannot be called so on the meta device.
    """
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    try:
        loss = model(input_ids=ids, labels=ids).loss
    except (TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called as model(input_ids=..., labels=...).loss on the meta device "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); give step=, a function of "
            "(model, batch, tokens) that returns the loss of a training step on the meta device"
        ) from error
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned no loss; give step=, a function of (model, batch, tokens)"
        )
    return loss


def _signature(block: nn.Module) -> Any:
    """What makes two blocks compute and allocate the same."""
    parts = []
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN) and k not in NUMBERS}
        parts.append((name, type(module).__qualname__, tuple(sorted(plain.items(), key=lambda kv: kv[0]))))
    tensors = [
        (n, tuple(p.shape), p.dtype, p.requires_grad)
        for n, p in [*block.named_parameters(), *block.named_buffers()]
    ]
    return str((parts, tensors))
