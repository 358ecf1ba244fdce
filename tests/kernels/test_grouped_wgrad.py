"""grouped_wgrad and expert_wgrad through PyTorch: the results of single products; bad input is refused."""

import pytest
import torch
from helpers import assert_close_to_exact

from chunkft.kernels import expert_wgrad, grouped_wgrad, wgrad
from chunkft.kernels.torch_grouped_wgrad import adjacent, by_one_product, can_join

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DYS = [torch.randn(20, size) for size in (64, 40, 33)]
X = torch.randn(20, 48)
ROWS = [slice(3, 50), None, slice(7, 7)]
OFFSETS = torch.tensor([5, 5, 17], dtype=torch.int32)


def test_groups_have_the_bits_of_single_slices():
    for dy, part, got in zip(DYS, ROWS, grouped_wgrad(DYS, X, ROWS, slice(3, 41)), strict=True):
        assert torch.equal(got, wgrad(dy, X, part, slice(3, 41)))
    outs = [torch.ones(64, 48), torch.ones(40, 48), torch.ones(33, 48)]
    got = grouped_wgrad(DYS, [X, X * 2, X], outs=outs, accumulate=True)
    assert all(a is b for a, b in zip(got, outs, strict=True))
    assert torch.equal(outs[1], 1 + wgrad(DYS[1], X * 2))
    assert grouped_wgrad([], X) == []
    assert grouped_wgrad(DYS, X, out_dtype=torch.float64)[0].dtype == torch.float64


def joined_operands(dtype):
    dys, x = [dy.to(dtype) for dy in DYS], X.to(dtype)
    spans, cols = [slice(3, 50), slice(0, 40), slice(7, 7)], slice(5, 48)
    exact = [dy[:, rows].double().t() @ x[:, cols].double() for dy, rows in zip(dys, spans, strict=True)]
    return dys, x, spans, cols, exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("given", "accumulate"),
    [("new", False), ("apart", False), ("apart", True), ("adjacent", False), ("adjacent", True)],
)
def test_one_product_of_joined_slices_is_the_products_of_each(dtype, given, accumulate):
    dys, x, spans, cols, exact = joined_operands(dtype)
    outs = None
    if given != "new":
        whole = torch.randn(87, 43).to(dtype)
        outs = (
            list(whole.split([47, 40, 0]))
            if given == "adjacent"
            else [whole[:47].clone(), whole[47:].clone(), X[:0, :43].to(dtype)]
        )
        assert (adjacent(outs) is not None) == (given == "adjacent")
        if accumulate:
            exact = [e + out.double() for e, out in zip(exact, outs, strict=True)]
    with torch.no_grad():
        got = by_one_product(dys, x, spans, cols, outs, accumulate, dtype)
    for i, (one, expected) in enumerate(zip(got, exact, strict=True)):
        assert outs is None or one is outs[i]
        assert_close_to_exact(one, expected.to(dtype), expected)
        if accumulate and one.numel() and dtype != torch.float64:
            # rounded once
            once = (expected.to(dtype).double() - expected).abs().max()
            assert (one.double() - expected).abs().max() <= once * (1 + 1e-3)
    if given == "new":
        assert len({one.untyped_storage().data_ptr() for one in got}) == 1


@pytest.mark.parametrize("change", ["gap", "order", "column", "storage"])
def test_outs_that_are_not_one_tensor_are_not_taken_for_one(change):
    whole = torch.zeros(20, 6)
    outs = {
        "gap": [whole[0:5], whole[6:9]],
        "order": [whole[5:9], whole[0:5]],
        "column": [whole[0:5, :3], whole[5:9, :3]],
        "storage": [whole[0:5], torch.zeros(25, 6)[5:9]],
    }[change]
    assert adjacent(outs) is None
    view = adjacent([whole[2:5], whole[5:5], whole[5:9]])
    assert view.shape == (7, 6)
    assert view.data_ptr() == whole[2:].data_ptr()


def test_bits_on_a_cpu_come_before_one_product():
    assert not can_join(DYS, [X] * 3)
    assert not can_join(DYS, [X.bfloat16() for _ in range(3)])
    shared = X.bfloat16()
    assert can_join(DYS, [shared, shared[:], shared])
    assert not can_join(DYS, [shared, shared[:, 1:], shared])
    assert not can_join(DYS[:1], [shared])


def test_experts_have_the_gradient_of_autograd():
    weight = torch.randn(3, 64, 48, dtype=torch.float64, requires_grad=True)
    dy, x = DYS[0].double(), X.double()
    starts = [0, *OFFSETS.tolist()]
    for e in range(3):
        part = slice(starts[e], starts[e + 1])
        (x[part] @ weight[e].t() * dy[part]).sum().backward()
    dense = weight.grad
    torch.testing.assert_close(expert_wgrad(dy, x, OFFSETS), dense)
    got = expert_wgrad(dy, x, OFFSETS, slice(1, 3), slice(3, 60), slice(5, 48))
    torch.testing.assert_close(got, dense[1:3, 3:60, 5:48])
    out = torch.ones(3, 64, 48, dtype=torch.float64)
    assert expert_wgrad(dy, x, OFFSETS, out=out, accumulate=True) is out
    torch.testing.assert_close(out, 1 + dense)
    assert int(expert_wgrad(dy, x, OFFSETS)[1].count_nonzero()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [None]}, "of one length, got 3, 3, 1, 3"),
        ({"x": [X]}, "of one length, got 3, 1, 3, 3"),
        ({"outs": [X]}, "of one length, got 3, 3, 3, 1"),
        ({"accumulate": True}, "accumulate=True needs outs="),
        ({"backend": "cuda"}, "backend='cuda' is not known"),
        ({"backend": "triton"}, "backend='triton' needs"),
        ({"x": X.double()}, r"dys\[0\] and x must share one floating dtype and device"),
        (
            {"x": X[:3]},
            r"dys\[0\] and x must be \(T, M\) and \(T, N\) with the same T, got \(20, 64\), \(3, 48\)",
        ),
        ({"rows": [None, slice(3, 41), None]}, r"rows\[1\]=slice\(3, 41, None\) is not allowed"),
        ({"cols": torch.tensor([1])}, "cols must be a slice or None, got Tensor"),
        (
            {"outs": [torch.ones(64, 48), torch.ones(40, 48), torch.ones(32, 48)]},
            r"outs\[2\] must be \(33, 48\)",
        ),
        (
            {"outs": [torch.ones(n, 48) for n in (64, 40, 33)], "out_dtype": torch.float64},
            r"disagrees with outs\[0\]\.dtype",
        ),
    ],
)
def test_bad_groups_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_wgrad(**{"dys": DYS, "x": X, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offsets": OFFSETS.long()}, "offsets must be 1-D int32 on cpu, got torch.int64"),
        (
            {"offsets": torch.tensor([5, 3], dtype=torch.int32)},
            r"offsets=\[5, 3\] must ascend from 0 to at most T=20",
        ),
        ({"offsets": torch.tensor([21], dtype=torch.int32)}, "at most T=20"),
        ({"offsets": torch.tensor([-1, 4], dtype=torch.int32)}, "must ascend from 0"),
        ({"experts": slice(0, 4)}, "experts=.* needs 0 <= start <= stop <= 3"),
        ({"rows": slice(0, 65)}, "rows=.* needs 0 <= start <= stop <= 64"),
        ({"x": X.double()}, "with the same T and dtype"),
        ({"out": torch.ones(3, 64, 47)}, r"out must have shape \(3, 64, 48\), got \(3, 64, 47\)"),
        ({"accumulate": True}, "accumulate=True needs out="),
        ({"backend": "triton"}, "backend='triton' needs"),
        ({"backend": "numpy"}, "backend='numpy' is not known"),
    ],
)
def test_bad_experts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        expert_wgrad(**{"dy": DYS[0], "x": X, "offsets": OFFSETS, **arguments})
