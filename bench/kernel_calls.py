"""Every kernel once, with the tile that a real shape takes, and how far its result is from fp64: for a first contact.

A call gets the device and whether it is a rehearsal (small and in the interpreter), launches the kernel, and returns a
function that compares: the largest error, and what the rule of the tests allows (twice PyTorch's error and a little).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chunkft import kernels
from chunkft.kernels import Blocks
from chunkft.kernels.heuristics import Config

Check = Callable[[], tuple[float, float]]
Call = Callable[[torch.device, bool], Check]

# (tokens, outputs, inputs) of a layer of Llama-2-7B, and of a rehearsal
REAL, SMALL = (1024, 4096, 4096), (83, 72, 56)


def _operands(
    device: torch.device, small: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    tokens, outputs, inputs = SMALL if small else REAL
    return (torch.randn(tokens, size, device=device).to(dtype) for size in (outputs, inputs))  # type: ignore[return-value]


def _within(ours: Tensor, theirs: Tensor, exact: Tensor) -> tuple[float, float]:
    off, other = (float((t.double() - exact).abs().max()) for t in (ours, theirs))
    return off, 2 * other + 1e-6 * (1 + float(exact.abs().max()))


def _tile(small: bool, **changes: Any) -> Config:
    base = Config(32, 32, 16, 4, 2) if small else Config(128, 128, 64, 8, 3)
    return replace(base, **changes)


def _wgrad(
    dtype: torch.dtype = torch.bfloat16,
    rows: Any = slice(8, 64),
    accumulate: bool = False,
    norm: bool = False,
    tf32: bool = False,
    picked: bool = False,
    **tile: Any,
) -> Call:
    def call(device: torch.device, small: bool) -> Check:
        dy, x = _operands(device, small, dtype)
        chosen = rows(dy, device) if callable(rows) else rows
        config = None if picked else _tile(small, **tile)
        whole = dy.double().t() @ x.double()
        index = _index(chosen, device)
        exact, theirs = whole[index], (dy.t() @ x)[index]
        out = None
        if accumulate:
            out = torch.randn(exact.shape, device=device)
            exact = exact + out.double()
            theirs = kernels.wgrad(dy, x, chosen, out=out.clone(), accumulate=True, backend="torch")
        squared = torch.zeros(1, device=device) if norm else None
        ours = kernels.wgrad(
            dy, x, chosen, out=out, accumulate=accumulate, backend="triton",
            tf32=tf32, squared_norm=squared, config=config,
        )  # fmt: skip

        def check() -> tuple[float, float]:
            off, allowed = _within(ours, theirs, exact)
            if tf32:
                allowed = max(allowed, 1e-2 * float(exact.abs().max()))
            if squared is not None:
                told, true = float(squared), float(ours.double().square().sum())
                if not abs(told - true) <= 1e-4 * true:
                    return abs(told - true), 1e-4 * true
            return off, allowed

        return check

    return call


def _index(rows: Any, device: torch.device) -> Any:
    if isinstance(rows, Blocks):
        return (rows.index[:, None] * rows.size + torch.arange(rows.size, device=device)).flatten()
    return slice(None) if rows is None else rows


def _grouped(device: torch.device, small: bool, **tile: Any) -> Check:
    dy, x = _operands(device, small)
    spans = [slice(8, 40), slice(3, 50), None]
    config = _tile(small, **tile)
    ours = kernels.grouped_wgrad([dy] * 3, x, spans, backend="triton", config=config)
    exact = dy.double().t() @ x.double()
    theirs = dy.t() @ x

    def check() -> tuple[float, float]:
        pairs = [
            _within(o, theirs[s or slice(None)], exact[s or slice(None)])
            for o, s in zip(ours, spans, strict=True)
        ]
        return max(pairs, key=lambda pair: pair[0] / pair[1])

    return check


def _experts(device: torch.device, small: bool) -> Check:
    dy, x = _operands(device, small)
    tokens = dy.shape[0]
    ends = [tokens // 3, tokens // 3, tokens - 1, tokens]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    ours = kernels.expert_wgrad(dy, x, offsets, rows=slice(8, 40), backend="triton", config=_tile(small))
    parts = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    exact = torch.stack([dy[p, 8:40].double().t() @ x[p].double() for p in parts])
    theirs = torch.stack([dy[p, 8:40].t() @ x[p] for p in parts])
    return lambda: _within(ours, theirs, exact)


def _embedding(device: torch.device, small: bool) -> Check:
    vocabulary, width, tokens = (50, 40, 90) if small else (32000, 4096, 4096)
    dy = torch.randn(tokens, width, device=device).to(torch.bfloat16)
    ids = torch.randint(0, vocabulary, (tokens,), device=device)
    ids[: tokens // 4] = 7  # one id that many tokens have
    rows = (3, vocabulary // 2)
    ours = kernels.embedding_grad(dy, ids, vocabulary, rows=rows, backend="triton")
    exact = torch.zeros(vocabulary, width, dtype=torch.float64, device=device).index_add_(0, ids, dy.double())
    exact = exact[rows[0] : rows[1]]
    return lambda: _within(ours, exact.to(torch.bfloat16), exact)


def _adamw(master: str, dtype: torch.dtype) -> Call:
    def call(device: torch.device, small: bool) -> Check:
        shapes = [(70, 33), (5,)] if small else [(4096, 4096), (1000, 333), (4096,)]
        generator = torch.Generator().manual_seed(1)

        def made(scale: float, kind: torch.dtype) -> list[Tensor]:
            return [(scale * torch.randn(s, generator=generator)).to(device, kind) for s in shapes]

        start = made(1.0, torch.float32)
        grads, first, second = made(1e-2, dtype), made(1e-2, torch.float32), made(1e-2, torch.float32)
        second = [v.square() for v in second]
        results = []
        for backend in ("triton", "torch"):
            extra: dict[str, Any] = {}
            weights = [w.to(dtype) for w in start]
            if master == "residual":
                split = [kernels.split_residual(w) for w in start]
                weights = [pair[0].clone() for pair in split]
                extra["residuals"] = [pair[1].clone() for pair in split]
            elif master == "fp32":
                extra["masters"] = [w.to(dtype).float() for w in start]
            m, v = [t.clone() for t in first], [t.clone() for t in second]
            steps = [torch.full((), 3.0) for _ in start]
            kernels.adamw(
                weights, grads, m, v, steps, lr=1e-3, master=master, backend=backend, seed=11, **extra
            )
            values = weights
            if master == "residual":
                values = list(map(kernels.apply_residual, weights, extra["residuals"]))
            elif master == "fp32":
                # compared themselves: a last bit of one can turn a rounded weight into its neighbour
                values = extra["masters"]
                if not all(torch.equal(w, t.to(dtype)) for w, t in zip(weights, values, strict=True)):
                    raise RuntimeError(f"backend={backend!r} left weights that are not their rounded masters")
            results.append([t.float() for t in (*values, *m, *v)])

        def check() -> tuple[float, float]:
            # the same operations in the same order: a last bit of the stored type at most
            step = 2.0**-7 if master in ("none", "stochastic") and dtype == torch.bfloat16 else 2.0**-20
            worst = 0.0
            for ours, theirs in zip(*results, strict=True):
                scale = theirs.abs() + 1e-3 * theirs.abs().max()
                worst = max(worst, float(((ours - theirs).abs() / scale).nan_to_num(torch.inf).max()))
            return worst, step

        return check

    return call


def _cross_entropy(device: torch.device, small: bool) -> Check:
    tokens, width, vocabulary = (32, 24, 500) if small else (1024, 4096, 32000)
    dtype = torch.float32 if small else torch.bfloat16
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    losses, _, _ = kernels.linear_cross_entropy(hidden, weight, targets, windows=[(0, 64, 128)])
    exact = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().t(), targets, reduction="none"
    )
    theirs = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    return lambda: _within(losses, theirs, exact)


def _blocks(dy: Tensor, device: torch.device) -> Blocks:
    return Blocks(torch.tensor([2, 0, 1], device=device), 8 if dy.shape[1] < 100 else 64)


def _single(dy: Tensor, device: torch.device) -> Tensor:
    return torch.tensor([44, 0, 7, 7, 3] * 8, device=device)


CALLS: dict[str, Call] = {
    "wgrad-picked": _wgrad(picked=True),
    "wgrad-pointers": _wgrad(rows=slice(3, 61)),
    "wgrad-tma": _wgrad(rows=slice(3, 61), tma=True),
    "wgrad-split": _wgrad(splits=3),
    "wgrad-split-tma": _wgrad(splits=3, tma=True),
    "wgrad-persistent": _wgrad(tma=True, persistent=True),
    "wgrad-persistent-odd": _wgrad(rows=slice(3, 61), tma=True, persistent=True),
    "wgrad-persistent-accumulate": _wgrad(accumulate=True, tma=True, persistent=True),
    "wgrad-blocks": _wgrad(rows=_blocks, picked=True),
    "wgrad-indices": _wgrad(rows=_single, picked=True),
    "wgrad-accumulate": _wgrad(accumulate=True, tma=True),
    "wgrad-norm": _wgrad(norm=True, splits=2),
    "wgrad-fp16": _wgrad(dtype=torch.float16, tma=True),
    "wgrad-fp32": _wgrad(dtype=torch.float32, picked=True),
    "wgrad-tf32": _wgrad(dtype=torch.float32, tf32=True, picked=True),
    "grouped": _grouped,
    "grouped-persistent": partial(_grouped, persistent=True),
    "experts": _experts,
    "embedding": _embedding,
    "adamw-fp32": _adamw("none", torch.float32),
    "adamw-bf16": _adamw("none", torch.bfloat16),
    "adamw-master": _adamw("fp32", torch.bfloat16),
    "adamw-residual": _adamw("residual", torch.bfloat16),
    "adamw-stochastic": _adamw("stochastic", torch.bfloat16),
    "cross-entropy": _cross_entropy,
}
