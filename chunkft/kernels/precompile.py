"""Compiles ahead, in a thread, what the first step of training would wait for."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from chunkft.kernels import choice, gpu
from chunkft.kernels.adamw import adamw
from chunkft.kernels.companding import FIRST_CODES, SECOND_CODES
from chunkft.kernels.embedding_grad import embedding_grad

_WIDTH = 16


def precompile(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    master: str = "residual",
    slices: Iterable[int] = (1,),
    moments: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    embedding_width: int | None = None,
    found_inf: bool = False,
    clip_factor: bool = False,
) -> Future[int]:
    """Compile, in a thread, the kernels that a GPU takes for updates and for embedding rows.

    What is compiled depends on dtypes and options, on the magnitude of the number of slices and on the width of the
    embedding, not on sizes: so each kernel runs once on a few elements of its own, on a stream of its own. Weight
    gradients are PyTorch's unless measured otherwise, and compile nothing. Wait for the result before a CUDA graph is
    captured: other threads must not allocate then.

    Args:
        device: where training happens; on a CPU there is nothing to compile.
        dtype: of weights and gradients.
        master: as for ``adamw``.
        slices: numbers of slices of the chunks.
        moments: dtypes of the first and of the second moment; int8 and uint8 where they are codes of 8 bits.
        embedding_width: columns of the embedding whose rows are trained; None if none are.
        found_inf: whether updates are told of infinities (a GradScaler).
        clip_factor: whether gradients are clipped.

    Returns:
        A future of the number of calls that were made; its ``result()`` raises what went wrong.
    """
    pool = ThreadPoolExecutor(1, "chunkft-precompile")
    counts = sorted(set(slices))
    future = pool.submit(
        _compile,
        torch.device(device),
        dtype,
        master,
        counts,
        moments,
        embedding_width,
        found_inf,
        clip_factor,
    )
    pool.shutdown(wait=False)
    return future


def _compile(
    device: torch.device,
    dtype: torch.dtype,
    master: str,
    slices: list[int],
    moments: tuple[torch.dtype, torch.dtype],
    embedding_width: int | None,
    found_inf: bool,
    clip_factor: bool,
) -> int:
    if not gpu.available() or not choice.asks(torch.empty(0, device=device)):
        return 0
    done = 0
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        one = torch.ones(1, device=device)
        for count in slices:
            params = [torch.zeros(_WIDTH, dtype=dtype, device=device) for _ in range(count)]
            first, second = (
                [torch.zeros(_WIDTH, dtype=kept, device=device) for _ in range(count)] for kept in moments
            )
            scales = None
            if moments == (FIRST_CODES, SECOND_CODES):
                scales = [torch.zeros(1, device=device) for _ in range(count)]
            extra = {
                kept: [torch.zeros(_WIDTH, dtype=kind, device=device) for _ in range(count)]
                for kept, kind in (("residual", torch.int16), ("fp32", torch.float32))
                if kept == master
            }
            adamw(
                params,
                params,
                first,
                second,
                torch.zeros(count, device=device if found_inf else "cpu"),
                lr=0.0,
                residuals=extra.get("residual"),
                masters=extra.get("fp32"),
                master=master,
                exp_avg_scales=scales,
                exp_avg_sq_scales=scales,
                found_inf=one if found_inf else None,
                clip_factor=one if clip_factor else None,
                backend="triton",
            )
            done += 1
        if embedding_width is not None:
            dy = torch.zeros(_WIDTH, embedding_width, dtype=dtype, device=device)
            embedding_grad(
                dy, torch.zeros(_WIDTH, dtype=torch.int64, device=device), 2, rows=(0, 1), backend="triton"
            )
            done += 1
    return done
