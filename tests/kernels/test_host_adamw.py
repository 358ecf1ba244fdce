"""AdamW of slices in host memory: the bits of the torch backend, for any number of threads."""

import itertools
import os
import threading

import pytest
import torch
from torch import nn

from chunkft.kernels.adamw import adamw
from chunkft.kernels.host_adamw import BLOCK, HostSlice, host_adamw

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MASTERS = [("none", FP32), ("none", BF16), ("none", FP16), ("fp32", BF16), ("fp32", FP16), ("residual", BF16)]
MASTERS += [("stochastic", BF16)]
# of one element, of no whole vector, tile or block, of more than one part of a thread
SHAPES = [(1,), (), (0, 4), (3, 5), (129,), (2, 3, 4), (1031,), (33, 65)]
LONG = (3 * 65536 + 777,)


@pytest.fixture
def rounded_roots(monkeypatch):
    """The torch backend with roots rounded to nearest, which MKL's are not always."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda self: self.double().pow(0.5).to(self.dtype))


class Chunk:
    """Tensors of some slices, all of different step counts."""

    def __init__(self, shapes, dtype=FP32, grad_dtype=None, first=FP32, second=FP32, master="none"):
        self.master = master
        self.params = [torch.randn(shape).to(dtype) for shape in shapes]
        self.grads = [torch.randn(shape).to(grad_dtype or dtype) for shape in shapes]
        self.exp_avgs = [torch.randn(shape).to(first) for shape in shapes]
        self.exp_avg_sqs = [torch.rand(shape).to(second) for shape in shapes]
        self.steps = torch.arange(len(shapes), dtype=FP32)
        self.extra = {}
        if master == "residual":
            self.extra = {"residuals": [torch.randint(-(2**15), 2**15, shape).short() for shape in shapes]}
        if master == "fp32":
            # some weights were changed by others since
            self.extra = {"masters": [p + (torch.rand(p.shape) < 0.5) for p in map(torch.Tensor.float, self.params)]}

    def tensors(self):
        kept = [entry for entries in self.extra.values() for entry in entries]
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *kept, self.steps]

    def copy(self):
        other = object.__new__(Chunk)
        other.__dict__ = {
            key: [tensor.clone() for tensor in value] if isinstance(value, list) else value
            for key, value in self.__dict__.items()
        }
        other.steps = self.steps.clone()
        other.extra = {key: [tensor.clone() for tensor in value] for key, value in self.extra.items()}
        return other

    def update(self, backend, **options):
        options = {"lr": 1e-2, "master": self.master, "seed": 5, **self.extra, **options}
        adamw(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, backend=backend, **options)


def assert_same(left, right):
    for a, b in zip(left.tensors(), right.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("moments", [(FP32, FP32), (BF16, FP32), (FP16, BF16)], ids=str)
@pytest.mark.parametrize(("master", "dtype"), MASTERS, ids=str)
def test_the_bits_of_the_torch_backend(master, dtype, moments, rounded_roots):
    for grad_dtype in (FP32, BF16, FP16):
        ours = Chunk(SHAPES, dtype, grad_dtype, *moments, master=master)
        theirs = ours.copy()
        for betas, weight_decay in [((0.9, 0.999), 0.01), ((0.3, 0.5), 0.0)]:
            options = {"betas": betas, "weight_decay": weight_decay, "lr": [0.1 * j for j in range(len(SHAPES))]}
            ours.update("host", **options)
            theirs.update("torch", **options)
            assert_same(ours, theirs)


def test_scaled_and_clipped_gradients(rounded_roots):
    ours = Chunk(SHAPES, BF16, FP16, master="residual")
    theirs = ours.copy()
    options = {"grad_scale": torch.tensor(3.0), "clip_factor": torch.tensor([0.7])}
    ours.update("host", **options)
    theirs.update("torch", **options)
    assert_same(ours, theirs)
