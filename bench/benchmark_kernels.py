"""Weight gradients and AdamW under pytest-benchmark: for its statistics, histograms and comparisons between runs.

pytest bench/benchmark_kernels.py                                on a CPU PyTorch's form, on a GPU both, a Llama's layer
pytest bench/benchmark_kernels.py --benchmark-autosave --benchmark-compare

`python -m bench.kernels` is the thorough one: all shapes, cold caches, the best of PyTorch, the model's prediction.
"""

from __future__ import annotations

import pytest
import torch

from chunkft.kernels import adamw, gpu, wgrad

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# (tokens, outputs, inputs): a layer of Llama-2-7B, or one small enough for a CPU
SHAPE = (4096, 4096, 4096) if CUDA else (256, 384, 256)
BACKENDS = ["torch", "triton"] if CUDA and gpu.available() else ["torch"]
ROWS = {"1/8": 8, "1/32": 32}


def finished(function, *arguments, **options):
    """The call with the device's work in it."""
    result = function(*arguments, **options)
    if CUDA:
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [0, 3], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("part", ROWS)
def benchmark_wgrad(benchmark, backend, start, part):
    tokens, outputs, inputs = SHAPE
    dy = torch.randn(tokens, outputs, device=DEVICE).to(DTYPE)
    x = torch.randn(tokens, inputs, device=DEVICE).to(DTYPE)
    rows = slice(start, start + outputs // ROWS[part])
    found = benchmark(finished, wgrad, dy, x, rows, backend=backend)
    exact = dy[:, rows].double().t() @ x.double()
    off = (found.double() - exact).abs().max()
    assert off <= 2 * ((dy[:, rows].t() @ x).double() - exact).abs().max() + 1e-6 * (1 + exact.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def benchmark_adamw(benchmark, backend):
    shapes = [(384, 256), (64, 256), (256,)]
    params = [torch.randn(shape, device=DEVICE) for shape in shapes]
    before = [param.clone() for param in params]
    state = [[torch.zeros_like(param) for param in params] for _ in range(3)]
    grads, m, v = [torch.ones_like(param) for param in params], state[0], state[1]
    steps = torch.zeros(len(params))
    benchmark(finished, adamw, params, grads, m, v, steps, lr=1e-3, backend=backend)
    assert all(bool((new < old).all()) for new, old in zip(params, before, strict=True))
