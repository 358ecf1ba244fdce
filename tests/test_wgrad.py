"""The weight gradient of a slice: the bits of the dense product in fp32, its accuracy in 16 bits."""

import sys

import pytest
import torch
from helpers import assert_close_to_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkft.kernels import Blocks, torch_wgrad, wgrad
from chunkft.kernels.heuristics import Config
from chunkft.kernels.launches import forget
from chunkft.kernels.torch_wgrad import saved_columns

kernels_wgrad = sys.modules["chunkft.kernels.wgrad"]  # the function has its module's name
pytestmark = pytest.mark.usefixtures("poisoned_memory")
LAYOUTS = ("plain", "transposed", "strided", "window", "expanded")


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=dtype).t()
    if layout == "strided":
        return torch.randn(rows, 2 * columns, dtype=dtype)[:, ::2]
    if layout == "window":
        return torch.randn(rows, columns + 5, dtype=dtype)[:, 3 : 3 + columns]
    if layout == "expanded":
        return torch.randn(1, columns, dtype=dtype).expand(rows, columns)
    return torch.randn(rows, columns, dtype=dtype)


@st.composite
def bounds(draw, size):
    start = draw(st.integers(0, size))
    return slice(start, draw(st.integers(start, size)))


sizes = st.one_of(st.integers(1, 20), st.integers(1, 260))
lengths = st.one_of(st.integers(0, 40), st.integers(41, 700))


# The fixtures hold no state that an example could change.
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data(), lengths, sizes, sizes, st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_slice_has_the_bits_of_the_dense_product(threads, data, tokens, outputs, inputs, dy_layout, x_layout):
    dy, x = matrix(tokens, outputs, dy_layout), matrix(tokens, inputs, x_layout)
    dense = dy.t().mm(x)
    rows, columns = data.draw(bounds(outputs)), data.draw(bounds(inputs))
    assert torch.equal(wgrad(dy, x, rows=rows), dense[rows])
    assert torch.equal(wgrad(dy, x, cols=columns), dense[:, columns])
    assert torch.equal(wgrad(dy, x, rows, columns), dense[rows, columns])
    assert torch.equal(wgrad(dy, x), dense)


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(20_011, 61, 43), (8_191, 5, 331), (30_001, 17, 1), (4_099, 700, 129), (12_289, 1, 90)],
)
def test_slice_has_the_bits_of_a_long_dense_product(threads, tokens, outputs, inputs):
    dy, x = torch.randn(tokens, outputs), torch.randn(tokens, inputs)
    dense = dy.t().mm(x)
    for start, stop in [(0, 1), (outputs // 3, outputs // 2 + 1), (outputs - 1, outputs), (0, outputs)]:
        assert torch.equal(wgrad(dy, x, rows=slice(start, stop)), dense[start:stop])
    for start, stop in [(0, 1), (inputs // 3, inputs // 2 + 1), (inputs - 1, inputs), (0, inputs)]:
        assert torch.equal(wgrad(dy, x, cols=slice(start, stop)), dense[:, start:stop])


@pytest.mark.parametrize(("tokens", "inputs"), [(293, 85), (233, 35), (20, 231), (507, 229)])
@pytest.mark.parametrize("outputs", [2, 3, 6, 11])
def test_slice_has_the_bits_of_a_skinny_dense_product(threads, tokens, outputs, inputs):
    # BLAS sums these in an order that depends on the whole shape.
    dy, x = torch.randn(tokens, outputs), torch.randn(tokens, inputs)
    dense = dy.t().mm(x)
    for start in range(0, inputs, 33):
        columns = slice(start, min(inputs, start + 34))
        assert torch.equal(wgrad(dy, x, cols=columns), dense[:, columns])
        assert torch.equal(wgrad(x, dy, rows=columns), x.t().mm(dy)[columns])
    assert torch.equal(wgrad(dy, x, rows=slice(1, 2)), dense[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 3, 5), (37, 70, 41), (513, 33, 130), (2049, 9, 67)]
)
def test_sixteen_bit_slices_are_as_accurate_as_dense_ones(dtype, tokens, outputs, inputs):
    dy, x = torch.randn(tokens, outputs).to(dtype), torch.randn(tokens, inputs).to(dtype)
    dense, exact = dy.t().mm(x), dy.double().t().mm(x.double())
    for a, b in [(0, 1), (1, outputs), (outputs // 2, outputs // 2 + 1)]:
        assert_close_to_exact(wgrad(dy, x, rows=slice(a, b)), dense[a:b], exact[a:b])
    for a, b in [(0, 2), (inputs // 3, inputs - 1), (inputs - 1, inputs)]:
        assert_close_to_exact(wgrad(dy, x, cols=slice(a, b)), dense[:, a:b], exact[:, a:b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_result_keeps_the_accumulators_digits(dtype):
    dy, x = torch.randn(300, 20).to(dtype), torch.randn(300, 30).to(dtype)
    exact = dy.double().t().mm(x.double())
    single = dy.float().t().mm(x.float())
    result = wgrad(dy, x, slice(3, 19), out_dtype=torch.float32)
    assert result.dtype == torch.float32
    assert_close_to_exact(result, single[3:19], exact[3:19])
    total = torch.ones(16, 30)
    wgrad(dy, x, slice(3, 19), out=total, accumulate=True)
    assert_close_to_exact(total, single[3:19] + 1, exact[3:19] + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "window"])
def test_a_sum_in_sixteen_bits_is_rounded_once(dtype, layout):
    dy, x = torch.randn(300, 40).to(dtype), torch.randn(300, 50).to(dtype)
    whole = (torch.randn(64, 64) * 50).to(dtype)
    out = {
        "rows": whole[:29, :50].clone(),
        "columns": whole[:50, :29].clone().t(),
        "window": whole[3:32, 5:55],
    }[layout]
    exact = out.double() + dy[:, 7:36].double().t() @ x.double()
    once = (exact.to(dtype).double() - exact).abs().max()
    for _ in range(2):  # as it is checked, and as it is remembered
        total = out.clone() if layout != "window" else out
        before = total.clone()
        assert wgrad(dy, x, slice(7, 36), out=total, accumulate=True) is total
        assert (total.double() - exact).abs().max() <= once * (1 + 1e-3)
        total.copy_(before)


def test_an_fp32_sum_of_sixteen_bit_operands_is_one_product(monkeypatch):
    """As on CUDA, whose addmm multiplies 16 bits into fp32; here a stand-in does, which checks what CUDA would."""
    calls = []

    def stand_in(name):
        def call(*operands, out_dtype, out=None):
            left, right = operands[-2:]
            assert left.dtype == right.dtype == torch.bfloat16
            assert out_dtype == torch.float32
            assert out is None or out.dtype == out_dtype
            calls.append((name, out is not None))
            product = left.float() @ right.float()
            product = product + operands[0] if name == "addmm" else product
            return product if out is None else out.copy_(product)

        return call

    dy, x = torch.randn(40, 30).bfloat16(), torch.randn(40, 20).bfloat16()
    exact = dy[:, 3:19].float().t() @ x.float()
    real = torch.mm, torch.addmm
    for module in (kernels_wgrad, torch_wgrad):
        monkeypatch.setattr(module, "multiplies_into_fp32", lambda operand: True)
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: (stand_in("mm") if "out_dtype" in k else real[0])(*a, **k)
    )
    monkeypatch.setattr(torch, "addmm", stand_in("addmm"))
    out = torch.ones(16, 20)
    with torch.no_grad():
        for _ in range(2):
            out.fill_(1.0)
            wgrad(dy, x, slice(3, 19), out=out, accumulate=True)
            torch.testing.assert_close(out, exact + 1)
            wgrad(dy, x, slice(3, 19), out=out)
            torch.testing.assert_close(out, exact)
        torch.testing.assert_close(wgrad(dy, x, slice(3, 19), out_dtype=torch.float32), exact)
    forget()
    assert calls == [("addmm", True), ("mm", True)] * 2 + [("mm", False)]


def test_torch_multiplies_sixteen_bits_into_fp32_in_place():
    """The signatures that CUDA's form calls, on the device that has shapes only."""
    a, b, out = (torch.empty(size, device="meta", dtype=kind) for size, kind in
                 (((6, 4), torch.bfloat16), ((4, 5), torch.bfloat16), ((6, 5), torch.float32)))  # fmt: skip
    # torch 2.11 has it, but takes out_dtype for beta on the device of shapes: asked for by its schema
    arguments = torch.ops.aten.addmm.dtype_out._schema.arguments
    assert [each.name for each in arguments] == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]
    assert [each.name for each in arguments if each.kwarg_only] == ["beta", "alpha", "out"]
    assert torch.mm(a, b, out_dtype=torch.float32, out=out) is out
    assert torch.mm(a, b, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_remembered_calls_are_told_apart(dtype):
    """Calls that differ in one thing each, twice in turn: what is remembered of one never answers another."""
    forget()
    dy, x = torch.randn(12, 40).to(dtype), torch.randn(12, 70).to(dtype)
    wide = torch.randn(12, 80).to(dtype)
    variants = [
        (dy, x, slice(3, 20), {}),
        (dy, x, slice(4, 20), {}),
        (dy, x, slice(3, 21), {}),
        (dy, x, slice(None, 20), {}),
        (wide[:, ::2], x, slice(3, 20), {}),
        (dy[:7], x[:7], slice(3, 20), {}),
        (dy, x[:, :33], slice(3, 20), {}),
        (dy, x, slice(3, 20), {"out_dtype": torch.float64}),
        (dy, x, slice(3, 20), {"cols": slice(5, 66)}),
        (dy, x, slice(3, 20), {"out": torch.empty(17, 70, dtype=dtype)}),
        (dy, x, slice(3, 20), {"out": torch.empty(70, 17, dtype=dtype).t()}),
        (dy, x, slice(3, 20), {"out": torch.ones(17, 70, dtype=dtype), "accumulate": True}),
        (dy, x, slice(3, 20), {"out": torch.empty(17, 70, dtype=torch.float64)}),
        (dy.double(), x.double(), slice(3, 20), {}),
    ]
    with torch.no_grad():
        for _ in range(2):
            for a, b, rows, options in variants:
                before = options["out"].clone() if options.get("accumulate") else 0
                got = wgrad(a, b, rows, **options)
                wanted = options.get("out_dtype") or (options["out"].dtype if "out" in options else a.dtype)
                exact = a.double().t() @ b.double()
                expected = (exact[rows, options.get("cols", slice(None))] + before).to(wanted)
                assert got.dtype == wanted
                assert "out" not in options or got is options["out"]
                torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-1)
                options.get("out", torch.empty(0)).fill_(1.0)
    for bad in ({"out": torch.empty(17, 71, dtype=dtype)}, {"accumulate": True}):
        with pytest.raises(ValueError, match="out"):
            wgrad(dy, x, slice(3, 20), **bad)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_result_that_is_given_in_fp32_has_the_bits_of_product_and_sum(threads, accumulate):
    dy, x = torch.randn(3001, 64), torch.randn(3001, 96)
    product = dy.t().mm(x)[32:64]
    for out in (torch.randn(32, 96), torch.randn(96, 32).t(), torch.randn(32, 100)[:, 3:99]):
        expected = out + product if accumulate else product
        wgrad(dy, x, slice(32, 64), out=out, accumulate=accumulate)
        assert torch.equal(out, expected)


def test_a_product_writes_only_where_it_can_go_row_by_row_or_column_by_column():
    dy, x = torch.zeros(5, 8).bfloat16(), torch.zeros(5, 6).bfloat16()
    whole = torch.zeros(20, 20).bfloat16()
    for out, direct in (
        (whole[:8, :6], True),
        (whole[:6, :8].t(), True),
        (whole[::2, :6][:8], True),
        (whole[:8, ::2][:, :6], False),
        (whole[:1, :6].expand(8, 6), False),
        (whole[:8, :6].float(), False),
        (whole[:8, :6].to("meta"), False),
    ):
        assert torch_wgrad.writes_into(out, dy, x, False, False) == direct


def test_gradients_flow_through_a_result_that_was_given():
    dy, x = torch.randn(9, 20).bfloat16(), torch.randn(9, 30).bfloat16()
    for _ in range(2):
        with torch.no_grad():
            wgrad(dy, x, slice(3, 19), out=torch.empty(16, 30, dtype=torch.bfloat16))
        leaf = dy.clone().requires_grad_()
        wgrad(leaf, x, slice(3, 19), out=torch.empty(16, 30, dtype=torch.bfloat16)).sum().backward()
        assert leaf.grad is not None
        assert int(leaf.grad.count_nonzero()) > 0
    with pytest.raises(RuntimeError, match="more than one element"):
        wgrad(dy, x, slice(3, 19), out=torch.empty(1, 30, dtype=torch.bfloat16).expand(16, 30))


def test_result_may_be_narrower_than_the_inputs():
    dy, x = torch.randn(9, 20), torch.randn(9, 30)
    result = wgrad(dy, x, slice(3, 19), out_dtype=torch.bfloat16)
    assert torch.equal(result, dy.t().mm(x)[3:19].bfloat16())


def test_double_precision_is_exact_to_its_last_bits():
    dy, x = torch.randn(90, 31, dtype=torch.float64), torch.randn(90, 77, dtype=torch.float64)
    torch.testing.assert_close(
        wgrad(dy, x, slice(4, 21), slice(9, 10)), (dy.t() @ x)[4:21, 9:10], rtol=1e-13, atol=1e-13
    )


def test_out_of_any_layout_receives_the_result():
    dy, x = torch.randn(7, 40), torch.randn(7, 50)
    dense = dy.t().mm(x)
    buffer = torch.full((60, 80), 3.0)
    target = buffer.t()[5:55:2, 10:42]
    assert wgrad(dy, x, slice(11, 36), slice(6, 38), out=target) is target
    assert torch.equal(target, dense[11:36, 6:38])
    assert int((buffer != 3.0).sum()) == target.numel()
    wgrad(dy, x, slice(11, 36), slice(6, 38), out=target, accumulate=True)
    assert torch.equal(target, dense[11:36, 6:38] * 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_index_tensors_gather_rows_and_columns(dtype):
    dy, x = torch.randn(33, 45, dtype=torch.float64), torch.randn(33, 21, dtype=torch.float64)
    dense = dy.t().mm(x)
    rows, columns = torch.tensor([44, 0, 7, 7, 3], dtype=dtype), torch.tensor([20, 1], dtype=dtype)
    torch.testing.assert_close(wgrad(dy, x, rows), dense[rows.long()])
    torch.testing.assert_close(wgrad(dy, x, cols=columns), dense[:, columns.long()])
    torch.testing.assert_close(wgrad(dy, x, rows, columns), dense[rows.long()][:, columns.long()])
    torch.testing.assert_close(wgrad(dy, x, slice(2, 9), columns), dense[2:9][:, columns.long()])
    assert wgrad(dy, x, rows[:0]).shape == (0, 21)


@pytest.mark.parametrize("size", [8, 11, 24])
def test_blocks_gather_neighbours(size):
    dy, x = torch.randn(33, 264, dtype=torch.float64), torch.randn(33, 528, dtype=torch.float64)
    dense = dy.t().mm(x)
    rows, columns = torch.tensor([264 // size - 1, 0, 5, 5]), torch.tensor([7, 1], dtype=torch.int32)
    wide = [(r * size + torch.arange(size)) for r in rows]
    high = [(c * size + torch.arange(size)) for c in columns]
    expected = dense[torch.cat(wide)]
    torch.testing.assert_close(wgrad(dy, x, Blocks(rows, size)), expected)
    torch.testing.assert_close(
        wgrad(dy, x, Blocks(rows, size), Blocks(columns, size)), expected[:, torch.cat(high)]
    )
    assert wgrad(dy, x, Blocks(rows[:0], size)).shape == (0, 528)
    assert wgrad(torch.zeros(3, 0), x[:3].float(), Blocks(rows[:0], size)).shape == (0, 528)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_squared_norm_is_that_of_the_stored_result(shape):
    dy, x = torch.randn(9, 20).bfloat16(), torch.randn(9, 30).bfloat16()
    norm, out = torch.full(shape, float("nan")), torch.ones(16, 30, dtype=torch.bfloat16)
    wgrad(dy, x, slice(3, 19), out=out, accumulate=True, squared_norm=norm)
    torch.testing.assert_close(norm, out.float().square().sum().view(shape))
    wgrad(dy, x, slice(3, 3), squared_norm=norm)
    assert norm.item() == 0


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    dy, x = torch.randn(tokens, 40), torch.randn(tokens, 70)
    assert torch.equal(wgrad(dy, x, slice(3, 36), slice(1, 69)), dy.t().mm(x)[3:36, 1:69])
    out = torch.full((33, 70), 2.0)
    wgrad(dy, x, slice(3, 36), out=out, accumulate=True)
    assert torch.equal(out, 2.0 + dy.t().mm(x)[3:36])


def test_empty_slices_and_empty_weights():
    dy, x = torch.randn(5, 40), torch.randn(5, 70)
    for at in (0, 33, 40):
        assert wgrad(dy, x, slice(at, at)).shape == (0, 70)
    assert wgrad(dy, x, cols=slice(70, 70)).shape == (40, 0)
    assert wgrad(torch.randn(5, 0), x).shape == (0, 70)
    assert wgrad(dy, torch.randn(5, 0), slice(2, 4)).shape == (2, 0)


def test_result_has_memory_of_its_own_size_only():
    dy, x = torch.randn(50, 400), torch.randn(50, 300)
    for result in (
        wgrad(dy, x, slice(5, 9)),
        wgrad(dy, x, cols=slice(5, 9)),
        wgrad(dy, x, slice(1, 2), slice(3, 4)),
    ):
        assert result.is_contiguous()
        assert result.untyped_storage().nbytes() == result.numel() * 4


def test_slices_take_none_as_either_end():
    dy, x = torch.randn(5, 40), torch.randn(5, 70)
    dense = dy.t().mm(x)
    assert torch.equal(wgrad(dy, x, slice(None, 7), slice(60, None)), dense[:7, 60:])
    assert torch.equal(wgrad(dy, x, slice(None)), dense)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 500), st.integers(1, 300))
def test_saved_columns_are_a_narrow_window_around_the_slice(data, size, outputs):
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    low, high = saved_columns(start, stop, size, outputs, torch.empty(1))
    assert 0 <= low <= start < stop <= high <= size
    if outputs >= 16:
        assert high - low < (stop - start) + 2 * 32 + 1
    for other in (torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.float64)):
        assert saved_columns(start, stop, size, outputs, other) == (start, stop)


DY, X = torch.zeros(4, 6), torch.zeros(4, 9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dy": torch.zeros(5, 6)},
            ValueError,
            r"\(T, M\) and \(T, N\) with the same T, got \(5, 6\) and \(4, 9\)",
        ),
        ({"dy": torch.zeros(4)}, ValueError, r"got \(4,\) and \(4, 9\)"),
        ({"x": torch.zeros(2, 4, 9)}, ValueError, r"got \(4, 6\) and \(2, 4, 9\)"),
        ({"x": X.double()}, ValueError, r"one floating dtype, got torch\.float32 and torch\.float64"),
        ({"dy": DY.int(), "x": X.int()}, ValueError, r"got torch\.int32"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend='cuda' is not known; allowed are 'auto', 'triton', 'torch'",
        ),
        ({"backend": "triton"}, ValueError, "backend='triton' needs"),
        (
            {"config": Config(64, 64, 16, 4, 2)},
            ValueError,
            "config is for backend='triton', got backend='auto'",
        ),
        ({"squared_norm": torch.zeros(2)}, ValueError, r"squared_norm must be one float32, got .* \(2,\)"),
        ({"squared_norm": torch.zeros(1).double()}, ValueError, r"squared_norm must be one float32"),
        (
            {"rows": Blocks(torch.tensor([0]), 8)},
            ValueError,
            "rows has blocks of size=8; needs .* divisor of 6",
        ),
        ({"rows": Blocks(torch.tensor([0]), 3)}, ValueError, "rows has blocks of size=3; needs at least 8"),
        ({"cols": Blocks(torch.tensor([[0]]), 9)}, ValueError, "cols must be a 1-D int32 or int64"),
        (
            {"cols": Blocks(torch.tensor([1]), 9)},
            IndexError,
            "cols has indices from 1 to 1; needs 0 <= index < 1",
        ),
        ({"accumulate": True}, ValueError, "accumulate=True needs out="),
        ({"out": torch.zeros(6, 8)}, ValueError, r"out must have shape \(6, 9\), got \(6, 8\)"),
        ({"out": torch.zeros(6, 9), "out_dtype": torch.float64}, ValueError, r"disagrees with out\.dtype"),
        (
            {"rows": slice(0, 7)},
            ValueError,
            r"rows=slice\(0, 7, None\) is not allowed; needs 0 <= start <= stop <= 6",
        ),
        ({"rows": slice(-2, 6)}, ValueError, "rows=.* is not allowed"),
        ({"cols": slice(5, 4)}, ValueError, "cols=.* needs 0 <= start <= stop <= 9"),
        ({"cols": slice(0, 4, 2)}, ValueError, "step 1"),
        ({"rows": torch.tensor([[1]])}, ValueError, r"rows must be a 1-D int32 or int64 tensor"),
        ({"rows": torch.tensor([1.0])}, ValueError, r"rows must be .* got torch\.float32"),
        ({"rows": torch.tensor([True] * 6)}, ValueError, r"rows must be .* got torch\.bool"),
        ({"rows": torch.tensor([6])}, IndexError, "needs 0 <= index < "),
        ({"cols": torch.tensor([-1])}, IndexError, "needs 0 <= index < "),
    ],
)
def test_bad_arguments_are_refused_and_out_is_untouched(arguments, error, message):
    before = None if "out" not in arguments else arguments["out"].clone()
    with pytest.raises(error, match=message):
        wgrad(**{"dy": DY, "x": X, **arguments})
    assert before is None or torch.equal(arguments["out"], before)
