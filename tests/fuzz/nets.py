"""Small models with what real ones have: shared and skipped modules, tied weights, activations in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

VOCABULARY = 13
CLASSES = 4


class Layer(nn.Module):
    """One layer, what is done to its output, and whether a batch may leave it out."""

    def __init__(self, spec: dict[str, Any], width: int, earlier: list[Layer]) -> None:
        super().__init__()
        kind, out = spec["kind"], spec["out"]
        self.then = spec["then"]
        self.recomputed = spec["recomputed"]
        # A layer that may be left out must fit around itself.
        self.optional = spec["optional"]
        out = width if self.optional else out
        self.residual = spec["residual"]
        fitting = [layer.core for layer in earlier if (layer.width_in, layer.width_out) == (width, out)]
        if kind == "again" and fitting:
            self.core: nn.Module = fitting[-1]
        elif kind == "norm":
            out, self.core = width, nn.LayerNorm(width)
        elif kind == "conv1d":
            self.core = Conv1D(out, width)
        else:
            self.core = nn.Linear(width, out, bias=spec["bias"])
            if kind == "tied" and fitting and type(fitting[-1]) is nn.Linear:
                self.core.weight = fitting[-1].weight
        self.width_in, self.width_out = width, out

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False) if self.recomputed else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        y = self.core(x)
        if self.then == "relu_":
            y = F.relu(y, inplace=True)
        elif self.then == "mul_":
            y = y.mul_(0.9)
        elif self.then == "add_":
            y += 0.1
        elif self.then == "gelu":
            y = F.gelu(y)
        elif self.then == "tanh":
            y = torch.tanh(y)
        return x + y if self.residual and self.width_in == self.width_out else y


class FuzzNet(nn.Module):
    """A table or plain numbers, a stack of layers, a head that is a module, tied to the table, or a function of it.

    Args:
        spec: ``tokens``, ``width``, ``layers``, ``head`` and ``twice`` (the whole stack runs twice if it fits).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        width = self.width = spec["width"]
        self.tokens, self.style = spec["tokens"], spec["head"]
        self.dims = spec["dims"]
        self.table: nn.Embedding | None = None
        if self.tokens:
            self.table = nn.Embedding(
                VOCABULARY, width, padding_idx=spec["padding"], scale_grad_by_freq=spec["by_frequency"]
            )
        self.layers = nn.ModuleList()
        for one in spec["layers"]:
            layer = Layer(one, width, list(self.layers))
            self.layers.append(layer)
            width = layer.width_out
        self.twice = spec["twice"] and width == self.width
        fits = self.tokens and width == self.width
        if not fits or self.style == "own":
            self.style = "own"
            self.head: nn.Module | None = nn.Linear(width, CLASSES)
        elif self.style == "tied":
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.head.weight = self.table.weight
        else:  # the table is read without its module
            self.head = None

    def batch(self, generator: torch.Generator) -> Tensor:
        """Tokens ``[2, 5]``, or numbers ``[5, width]`` or ``[2, 5, width]``, in fp64."""
        if self.tokens:
            return torch.randint(0, VOCABULARY, (2, 5), generator=generator)
        shape = (2, 5, self.width) if self.dims == 3 else (5, self.width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        if self.table is not None:
            x = self.table(x)
        for _ in range(2 if self.twice else 1):
            for layer in self.layers:
                if not (skip and layer.optional):
                    x = layer(x)
        return F.linear(x, self.table.weight) if self.head is None else self.head(x)


def build(spec: dict[str, Any], seed: int) -> FuzzNet:
    """The model of a program in fp64; the weights that ``spec["frozen"]`` counts are frozen, never all."""
    torch.manual_seed(seed)
    model = FuzzNet(spec).to(torch.float64)
    parameters = list(model.parameters())
    for number in spec["frozen"]:
        if number % len(parameters) != len(parameters) - 1:
            parameters[number % len(parameters)].requires_grad_(False)
    return model


def loss_of(output: Tensor, generator: torch.Generator) -> Tensor:
    """Mean square distance to random targets."""
    target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return (output - target).square().mean()
