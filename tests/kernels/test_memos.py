"""What calls remember is for calls of the same kind only: traced, wrapped and autocast ones are others."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from chunkft.kernels import choice, grouped_choice, grouped_wgrad, triton_wgrad, wgrad
from chunkft.kernels.heuristics import Config
from chunkft.kernels.launches import forget, has_memory


def operands(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.randn(5, 8).to(dtype), torch.randn(5, 6).to(dtype)


class Wrapped(torch.Tensor):
    """A tensor that holds another one, as DTensor does: nothing lies at its own address."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        result = tree_map_only(torch.Tensor, Wrapped, func(*plain[0], **plain[1]))
        return return_and_correct_aliasing(func, args, kwargs or {}, result)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_products_are_traced_at_any_size(mode):
    dy, x = operands()
    expected = wgrad(dy, x, slice(2, 6))
    for _ in range(2):
        graph = make_fx(lambda a, b: wgrad(a, b, slice(2, 6)), tracing_mode=mode)(dy, x)
        assert torch.equal(graph(dy, x), expected)
        groups = make_fx(lambda a, b: grouped_wgrad([a, a], b, [slice(2, 6), None])[0], tracing_mode=mode)
        assert torch.equal(groups(dy, x)(dy, x), expected)
    if mode == "symbolic":
        wider = torch.cat([dy, dy]), torch.cat([x, x])
        assert torch.equal(graph(*wider), wgrad(*wider, slice(2, 6)))


def test_the_dtype_is_the_operands_under_autocast_at_every_call():
    dy, x = operands(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert [wgrad(dy, x, slice(0, 4)).dtype for _ in range(3)] == [torch.float16] * 3


def test_bounds_that_are_tensors_may_change():
    dy, x = operands()
    start = torch.tensor(0)
    for low in range(4):
        start.fill_(low)
        assert torch.equal(wgrad(dy, x, slice(start, 6)), wgrad(dy, x, slice(low, 6)))
    index = torch.tensor([0, 1])
    assert wgrad(dy, x, index, slice(start, 6)).shape == (2, 3)


def test_only_plain_tensors_have_memory_that_a_kernel_reads(monkeypatch):
    """The others stay with PyTorch, whatever was measured of their shape."""
    dy, x = operands()
    seen = []
    torch.func.vmap(lambda t: (seen.append(has_memory(t)), t)[1])(torch.ones(2, 2))
    with FakeTensorMode():
        fake = torch.empty(5, 8)
    assert seen == [False]
    assert not has_memory(fake)
    assert not has_memory(Wrapped(dy))
    assert has_memory(dy)
    assert has_memory(torch.nn.Parameter(x))

    def refuse(*_):
        raise AssertionError("was asked for a kernel")

    monkeypatch.setattr(choice, "asks", lambda tensor: True)
    monkeypatch.setattr(triton_wgrad, "_decide", refuse)
    monkeypatch.setattr(grouped_choice, "_decide", refuse)
    expected = wgrad(dy, x, slice(1, 4), backend="torch")
    for _ in range(2):
        ours = wgrad(Wrapped(dy), Wrapped(x), slice(1, 4))
        assert torch.equal(ours.inner, expected)
        groups = grouped_wgrad([Wrapped(dy)] * 2, Wrapped(x), [slice(1, 4), None])
        assert torch.equal(groups[0].inner, expected)
        batch = torch.func.vmap(lambda a, b: wgrad(a, b, slice(1, 4)))(dy[None], x[None])
        assert torch.equal(batch[0], expected)
    with pytest.raises(AssertionError, match="was asked"):
        grouped_wgrad([dy] * 2, x, [slice(1, 4), None])


def test_slices_of_other_dtypes_are_decided_anew(monkeypatch):
    """One launch has one dtype: what was decided for slices of bf16 is not for a mixture of the same shapes."""
    taken = Config(32, 32, 16, 4, 2)
    monkeypatch.setattr(choice, "asks", lambda tensor: True)
    monkeypatch.setattr(grouped_choice, "choose_group", lambda *_, **__: taken)
    forget()

    def way(*dtypes):
        pairs = [operands(dtype) for dtype in dtypes]
        dys, xs = ([pair[i] for pair in pairs] for i in (0, 1))
        spans, cols = [slice(0, 8)] * len(dtypes), [slice(0, 6)] * len(dtypes)
        return grouped_choice.way_of_groups(dys, xs, spans, cols, None, False, torch.bfloat16, False, True)

    assert way(torch.bfloat16, torch.bfloat16) == taken
    assert way(torch.bfloat16, torch.float16) == "one by one"
    forget()
