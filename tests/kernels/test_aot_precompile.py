"""What was compiled ahead is what training then launches."""

import pytest
import torch

pytest.importorskip("triton")

from aot import CACHE

from bench.empty_launches import empty_launches
from chunkft.kernels import adamw, embedding_grad, precompile


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    with empty_launches() as record:
        yield record


def update(count, dtype, master, **options):
    params = [torch.zeros(40 + j, 24, dtype=dtype) for j in range(count)]
    state = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    extras = {"residual": ("residuals", torch.int16), "fp32": ("masters", torch.float32)}
    if master in extras:
        name, kind = extras[master]
        options[name] = [torch.zeros_like(p, dtype=kind) for p in params]
    adamw(params, params, *state, torch.zeros(count), lr=1e-3, master=master, backend="triton", **options)


@pytest.mark.parametrize("master", ["residual", "fp32", "stochastic"])
@pytest.mark.parametrize("told", [False, True])
def test_training_compiles_nothing_that_was_compiled_ahead(record, master, told):
    made = precompile(
        "cpu", torch.bfloat16, master=master, slices=[3, 20, 3], embedding_width=96, found_inf=told
    ).result()
    assert made == 3
    before = set(record.variants)
    assert len(before) == 3
    options = {"found_inf": torch.zeros(1)} if told else {}
    update(5, torch.bfloat16, master, **options)
    update(33, torch.bfloat16, master, **options)
    ids = torch.randint(0, 70, (130,))
    embedding_grad(torch.zeros(130, 96).bfloat16(), ids, 70, rows=(5, 41), backend="triton")
    assert {one.variant for one in record.launches} == before
    # another dtype is another kernel
    update(5, torch.float32, "none", **options)
    assert len(record.variants) == 4


def test_on_a_cpu_there_is_nothing_to_compile():
    assert precompile("cpu", torch.float32, master="none").result() == 0


def test_what_goes_wrong_is_raised_by_the_result(record):
    with pytest.raises(ValueError, match="master='other' is not known"):
        precompile("cpu", torch.float32, master="other").result()
