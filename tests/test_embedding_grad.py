"""The gradient of a slice of an embedding table has the bits of PyTorch's dense one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkft.kernels import embedding_grad

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def dense_gradient(dy, ids, vocabulary, padding_idx=None, by_frequency=False):
    table = torch.zeros(vocabulary, dy.shape[-1], dtype=dy.dtype, requires_grad=True)
    F.embedding(ids, table, padding_idx, scale_grad_by_freq=by_frequency).backward(dy)
    return table.grad


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.data(),
    st.lists(st.integers(0, 9), min_size=0, max_size=3),
    st.integers(1, 60),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_slice_has_the_bits_of_the_dense_gradient(
    threads, data, lead, vocabulary, width, by_frequency, id_dtype
):
    ids = torch.randint(0, vocabulary, lead, dtype=id_dtype)
    dy = torch.randn(*lead, width)
    padding_idx = data.draw(st.one_of(st.none(), st.integers(0, vocabulary - 1)))
    dense = dense_gradient(dy, ids, vocabulary, padding_idx, by_frequency)
    a = data.draw(st.integers(0, vocabulary))
    b = data.draw(st.integers(a, vocabulary))
    rows = embedding_grad(dy, ids, vocabulary, (a, b), None, padding_idx, by_frequency)
    assert torch.equal(rows, dense[a:b])
    c = data.draw(st.integers(0, width))
    d = data.draw(st.integers(c, width))
    columns = embedding_grad(dy, ids, vocabulary, None, (c, d), padding_idx, by_frequency)
    assert torch.equal(columns, dense[:, c:d])
    both = embedding_grad(dy, ids, vocabulary, (a, b), (c, d), padding_idx, by_frequency)
    assert torch.equal(both, dense[a:b, c:d])


def test_many_tokens_add_up_in_the_order_of_the_dense_gradient(threads):
    ids = torch.randint(0, 300, (40_009,)) ** 2 // 300
    dy = torch.randn(40_009, 33)
    dense = dense_gradient(dy, ids, 300)
    for a, b in [(0, 1), (0, 300), (7, 250), (299, 300)]:
        assert torch.equal(embedding_grad(dy, ids, 300, (a, b)), dense[a:b])
    assert torch.equal(embedding_grad(dy, ids, 300, None, (5, 32)), dense[:, 5:32])


def test_rows_that_no_id_hits_are_zero():
    ids, dy = torch.tensor([[3, 5, 3]]), torch.randn(1, 3, 4)
    assert torch.equal(embedding_grad(dy, ids, 20, (6, 20)), torch.zeros(14, 4))
    assert torch.equal(embedding_grad(dy, ids, 20, (4, 5)), torch.zeros(1, 4))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_gradients(layout):
    ids = torch.randint(0, 13, (5, 6))
    dy = {
        "transposed": torch.randn(6, 5, 7).transpose(0, 1),
        "strided": torch.randn(5, 6, 14)[..., ::2],
        "expanded": torch.randn(1, 1, 7).expand(5, 6, 7),
    }[layout]
    dense = dense_gradient(dy, ids, 13)
    assert torch.equal(embedding_grad(dy, ids, 13, (2, 11)), dense[2:11])
    assert torch.equal(embedding_grad(dy, ids.t().contiguous().t(), 13, None, (1, 6)), dense[:, 1:6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_as_accurate_as_the_dense_gradient(dtype):
    ids = torch.randint(0, 11, (200,))
    dy = torch.randn(200, 9).to(dtype)
    dense, exact = dense_gradient(dy, ids, 11), dense_gradient(dy.double(), ids, 11)
    part = embedding_grad(dy, ids, 11, (3, 8))
    assert part.dtype == dtype
    assert_close_to_exact(part, dense[3:8], exact[3:8])


def test_memory_grows_with_the_slice_not_with_the_vocabulary():
    ids, dy = torch.tensor([1, 2_000_000_000]), torch.ones(2, 3)
    part = embedding_grad(dy, ids, 2_000_000_001, (1_999_999_990, 2_000_000_001))
    assert part.shape == (11, 3)
    assert part.sum() == 3
    assert torch.equal(part[10], torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dy": torch.zeros(3, 4)}, r"dy must be of shape ids\.shape \+ \(H,\), got \(3, 4\) for ids \(2,\)"),
        ({"rows": (3, 2)}, r"rows=\(3, 2\) is not allowed; needs 0 <= start <= stop <= 5"),
        ({"rows": (0, 6)}, r"rows=\(0, 6\) is not allowed"),
        ({"rows": (-1, 2)}, r"rows=\(-1, 2\) is not allowed"),
        ({"cols": (0, 5)}, r"cols=\(0, 5\) is not allowed; needs 0 <= start <= stop <= 4"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        embedding_grad(
            **{"dy": torch.zeros(2, 4), "ids": torch.tensor([0, 1]), "num_embeddings": 5, **arguments}
        )
