"""Weights that stream to a GPU are updated in host memory by the native core; here it is told to do so on a CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from test_streamed_training import Run, model_of, optimizer_of, train

import chunkft.optim.chunk_optimizer as chunk_optimizer
from chunkft.kernels import host_adamw


def run(dtype: torch.dtype, *, native: bool, **options: object) -> tuple[Run, int]:
    net = model_of("llama", True).to(dtype)
    core = mock.Mock(wraps=host_adamw._core.host_adamw)
    with mock.patch.object(chunk_optimizer, "_beside_gpu", return_value=native):
        optimizer = optimizer_of(net, "host", {}, chunks=3, interval=2, **options)
    with mock.patch.object(host_adamw._core, "host_adamw", core):
        result = train(Run(), net, optimizer, "llama", range(7))
    return result, core.call_count


@pytest.mark.parametrize("master", ["residual", "fp32", "none"])
def test_the_native_update_trains_as_the_one_of_torch(master):
    dtype = torch.float32 if master == "none" else torch.bfloat16
    native, calls = run(dtype, native=True, master=master)
    plain, none = run(dtype, native=False, master=master)
    assert calls >= 7
    assert none == 0
    exact = 1e-5 if master == "none" else 2e-2
    assert native.losses == pytest.approx(plain.losses, rel=exact)
    for name, weight in native.weights.items():
        torch.testing.assert_close(weight, plain.weights[name], rtol=exact, atol=exact)


@pytest.mark.parametrize("native", [True, False])
def test_state_of_8_bits_is_updated_by_the_core_wherever_it_is_on_the_host(native):
    _, calls = run(torch.bfloat16, native=native, state_bits=8)
    assert calls >= 7
