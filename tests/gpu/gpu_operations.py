"""Every operation of chunkft.kernels on small odd inputs, with what PyTorch and fp64 make of the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_machine import Machine
from torch import Tensor

from chunkft.kernels import adamw, embedding_grad, expert_wgrad, grouped_wgrad, linear_cross_entropy, wgrad
from chunkft.kernels.heuristics import Config

PLAIN = Config(32, 64, 32, 4, 3)
TMA = Config(32, 64, 32, 4, 3, tma=True)
SPLIT = Config(32, 64, 32, 4, 3, splits=4)
TOKENS = (
    333,
    97,
)  # on a GPU and in a rehearsal: no multiple of a step of tokens, and four steps for four parts
# outputs, inputs, and a slice that begins at no multiple of 8
OUTPUTS, INPUTS, ROWS = 136, 104, slice(19, 122)
Tensors = list[Tensor]


@dataclass
class Operation:
    """`work` computes from `inputs`, which `renew` fills anew in place.

    `exact` and `theirs` compute the same from copies of the inputs on the CPU: in fp64, and as PyTorch does in the
    dtype of the inputs.
    """

    inputs: Tensors
    work: Callable[[], Tensors]
    exact: Callable[[Tensors], Tensors]
    theirs: Callable[[Tensors], Tensors]

    def renew(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.inputs:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def on_cpu(self) -> Tensors:
        return [tensor.detach().cpu().clone() for tensor in self.inputs]


def _product(dy: Tensor, x: Tensor, rows: slice = ROWS, dtype: torch.dtype | None = None) -> Tensor:
    made = (dy.double().t() @ x.double())[rows] if dtype is None else (dy.float().t() @ x.float())[rows]
    return made if dtype is None else made.to(dtype)


def slice_gradient(machine: Machine, config: Config) -> Operation:
    tokens = machine.pick(*TOKENS)
    dy = machine.randn(tokens, OUTPUTS, dtype=torch.bfloat16)
    x = machine.randn(tokens, INPUTS, dtype=torch.bfloat16)
    return Operation(
        [dy, x],
        lambda: [wgrad(dy, x, ROWS, **machine.kernel(config))],
        lambda own: [_product(*own)],
        lambda own: [_product(*own, dtype=torch.bfloat16)],
    )


def shared_input(machine: Machine) -> Operation:
    sizes, rows = (136, 40, 64), [ROWS, slice(0, 40), slice(5, 64)]
    tokens = machine.pick(*TOKENS)
    inputs = [machine.randn(tokens, size, dtype=torch.bfloat16) for size in (*sizes, INPUTS)]
    *dys, x = inputs
    return Operation(
        inputs,
        lambda: grouped_wgrad(dys, x, rows, **machine.kernel(SPLIT)),
        lambda own: [_product(dy, own[3], part) for dy, part in zip(own[:3], rows, strict=True)],
        lambda own: [
            _product(dy, own[3], part, torch.bfloat16) for dy, part in zip(own[:3], rows, strict=True)
        ],
    )


def experts(machine: Machine) -> Operation:
    tokens = machine.pick(*TOKENS)
    ends = [tokens // 7, tokens // 7, tokens // 2, tokens]
    dy = machine.randn(tokens, OUTPUTS, dtype=torch.bfloat16)
    x = machine.randn(tokens, INPUTS, dtype=torch.bfloat16)
    offsets = torch.tensor(ends, dtype=torch.int32, device=machine.device)

    def plain(own: Tensors, dtype: torch.dtype | None) -> Tensors:
        parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        return [torch.stack([_product(own[0][part], own[1][part], ROWS, dtype) for part in parts])]

    return Operation(
        [dy, x],
        lambda: [expert_wgrad(dy, x, offsets, None, ROWS, **machine.kernel(PLAIN))],
        lambda own: plain(own, None),
        lambda own: plain(own, torch.bfloat16),
    )


def table_rows(machine: Machine) -> Operation:
    vocabulary, rows = 97, (11, 90)
    # PyTorch's own on a CPU adds in the dtype of the result
    kept = torch.bfloat16 if machine.triton else torch.float32
    ids = torch.randint(0, vocabulary, machine.pick(*((size,) for size in TOKENS))).to(machine.device)
    dy = machine.randn(len(ids), 70, dtype=kept)

    def dense(dtype: torch.dtype, own: Tensors) -> Tensors:
        table = torch.zeros(vocabulary, 70, dtype=dtype, requires_grad=True)
        F.embedding(ids.cpu(), table).backward(own[0].to(dtype))
        assert table.grad is not None
        return [table.grad[slice(*rows)]]

    return Operation(
        [dy],
        lambda: [embedding_grad(dy, ids, vocabulary, rows, **machine.kernel())],
        lambda own: dense(torch.float64, own),
        lambda own: [part.to(kept) for part in dense(torch.float32, own)],
    )


def update(machine: Machine) -> Operation:
    """Two slices of a matrix and a vector; moments begin as squares, so that any refill is allowed."""
    shapes = [(45, 77), (3, 5), (4097,)]
    inputs = [machine.randn(*shape) for shape in shapes] + [machine.randn(*shape) for shape in shapes]

    def run(own: Tensors, backend: dict[str, str]) -> Tensors:
        params, grads = [tensor.clone() for tensor in own[:3]], own[3:]
        first, second = [grad * 0.5 for grad in grads], [grad * grad for grad in grads]
        steps = torch.full((3,), 7.0, dtype=torch.float32, device=own[0].device)
        adamw(params, grads, first, second, steps, lr=1e-2, **backend)
        return [*params, *first, *second, steps]

    def exact(own: Tensors) -> Tensors:
        return run([tensor.double() for tensor in own], {"backend": "torch"})

    return Operation(
        inputs,
        lambda: run(inputs, machine.kernel()),
        exact,
        lambda own: run(own, {"backend": "torch"}),
    )


def head(machine: Machine) -> Operation:
    vocabulary, width, windows = 513, 72, ((0, 13, 401), (1, 3, 9))
    targets = torch.randint(0, vocabulary, machine.pick(*((size,) for size in TOKENS))).to(machine.device)
    targets[::5] = -100
    kept = machine.pick(torch.bfloat16, torch.float32)  # some CPUs are slow with 16 bits
    hidden = machine.randn(len(targets), width, dtype=kept)
    weight = machine.randn(vocabulary, width, dtype=kept)

    def dense(own: Tensors, dtype: torch.dtype) -> Tensors:
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_(True) for tensor in own]
        logits = leaves[0] @ leaves[1].t()
        exact = dtype if dtype == torch.float64 else torch.float32
        losses = F.cross_entropy(logits.to(exact), targets.cpu(), reduction="none")
        losses.sum().backward()
        dx, dw = (leaf.grad for leaf in leaves)
        assert dw is not None
        assert dx is not None
        return [losses.detach(), dx, *(dw.narrow(dim, a, b - a) for dim, a, b in windows)]

    def work() -> Tensors:
        losses, dx, dw = linear_cross_entropy(hidden, weight, targets, windows)
        assert dx is not None
        return [losses, dx, *dw]

    return Operation(
        [hidden, weight], work, lambda own: dense(own, torch.float64), lambda own: dense(own, kept)
    )


OPERATIONS: dict[str, Callable[[Machine], Operation]] = {
    "wgrad": lambda machine: slice_gradient(machine, PLAIN),
    "wgrad-split": lambda machine: slice_gradient(machine, SPLIT),
    "wgrad-tma": lambda machine: slice_gradient(machine, TMA),
    "grouped_wgrad": shared_input,
    "expert_wgrad": experts,
    "embedding_grad": table_rows,
    "adamw": update,
    "linear_cross_entropy": head,
}


def lacks(machine: Machine, name: str) -> str:
    """Why the device cannot do an operation; empty if it can."""
    if name.endswith("tma") and machine.real and torch.cuda.get_device_capability(machine.device) < (9, 0):
        return "tensor descriptors need compute capability 9.0"
    return ""
