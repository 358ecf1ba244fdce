"""Real launches over a driver that does nothing: every form of the benchmark, what is compiled, what is remembered."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from aot import CACHE

import chunkft
from bench import kernels
from bench.empty_launches import empty_launches
from bench.kernel_cases import FORMS, Case, cases
from bench.kernel_setup import Setup
from bench.variants import LLAMA_2_7B, llama, sweep
from chunkft.kernels import (
    Blocks,
    choice,
    expert_wgrad,
    grouped_choice,
    grouped_wgrad,
    launches,
    measured,
    wgrad,
)
from chunkft.kernels.heuristics import Config, Problem, candidates
from chunkft.kernels.launches import Launch
from chunkft.kernels.targets import TARGETS

H200 = TARGETS["h200"]
DY, X = torch.randn(256, 512).bfloat16(), torch.randn(256, 384).bfloat16()


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))


@pytest.fixture
def record():
    with empty_launches() as record:
        yield record


def distinct() -> list[Case]:
    """The smallest case of each form, configuration (split or not) and number of slices."""
    seen: dict[tuple, Case] = {}
    for case in cases():
        config = kernels.config_of(case, H200)
        key = case.form, replace(config, splits=min(config.splits, 2)), len(case.rows)
        size = case.tokens * max(rows for rows, _ in case.weights)
        if key not in seen or size < seen[key].tokens * max(rows for rows, _ in seen[key].weights):
            seen[key] = case
    return list(seen.values())


DISTINCT = distinct()


def test_the_distinct_cases_are_of_every_form():
    assert {case.form for case in DISTINCT} == set(FORMS)
    assert len(DISTINCT) < len(list(cases())) / 4


@pytest.mark.parametrize("case", DISTINCT, ids=lambda case: case.title.replace(" ", ""))
def test_every_configuration_of_the_benchmark_launches(record, case):
    config = kernels.config_of(case, H200)
    setup = Setup(case, torch.device("cpu"), values=torch.empty)
    setup.chunkft("triton", config)
    setup.chunkft("triton", config)
    first, second = record.launches
    assert first == second
    assert 0 < first.grid[0] <= kernels.tiles_of(case, config)
    assert len(record.variants) == 1


@pytest.mark.parametrize(("by", "tokens"), [("bytes", 1024), ("interleaved", 1024), ("bytes", 4000)])
def test_a_sweep_over_llama_2_7b_compiles_few_variants(by, tokens):
    model = llama(LLAMA_2_7B)
    found = sweep(model, chunkft.partition(model, chunks=32, by=by), tokens)
    named = "\n".join(found.variants.values())
    kernels_of = {one.kernel for one in found.launches}
    assert kernels_of >= {"adamw_kernel", "embedding_grad_kernel"}
    assert any(name.startswith("wgrad") for name in kernels_of)
    assert len(found.launches) > 32 + 224
    assert len(found.variants) <= 12, named


def test_a_prepared_launch_has_the_arguments_and_the_variant_of_tritons_own(record, monkeypatch):
    """Calls of every kind twice, and once without what is remembered: the same kernel, grid and compiled variant."""
    index = torch.tensor([1, 0])
    odd = torch.randn(256, 515).bfloat16()[:, 1:-2]
    calls = [
        lambda: wgrad(DY, X, slice(64, 192), backend="triton"),
        lambda: wgrad(DY, X, slice(3, 77), backend="triton"),
        lambda: wgrad(DY, X, slice(64, 65), backend="triton"),
        lambda: wgrad(DY, X, cols=slice(8, 80), backend="triton"),
        lambda: wgrad(DY, X, Blocks(index, 64), backend="triton"),
        lambda: wgrad(DY, X, index, backend="triton"),
        lambda: wgrad(odd, X, slice(64, 192), backend="triton"),
        lambda: wgrad(DY[:100], X[:100], slice(64, 192), backend="triton"),
        lambda: wgrad(DY.float(), X.float(), slice(64, 192), backend="triton", tf32=True),
        lambda: wgrad(DY, X, slice(64, 192), out=torch.empty(384, 128).t(), backend="triton"),
        lambda: wgrad(DY, X, slice(0, 64), backend="triton", squared_norm=torch.zeros(())),
        lambda: wgrad(DY, X, slice(0, 64), backend="triton", config=Config(64, 128, 64, 4, 3, 2)),
    ]
    for call in calls:
        del record.launches[:]
        call()
        call()
        launches.forget()
        call()
        monkeypatch.setattr(Launch, "__call__", lambda self, aligned, *a: self.through_jit(*a))
        call()
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
        first, *others = record.launches
        assert others == [first] * 3


def test_tensors_that_are_aligned_otherwise_get_a_variant_of_their_own(record):
    buffer = torch.randn(256 * 512 + 8).bfloat16()
    config = Config(64, 128, 64, 4, 3)
    for offset in (0, 8, 4, 1, 0):
        dy = buffer[offset : offset + 256 * 512].view(256, 512)
        wgrad(dy, X, slice(0, 64), backend="triton", config=config)
    variants = [one.variant for one in record.launches]
    assert variants[0] == variants[1] == variants[4]
    assert variants[2] == variants[3] != variants[0]
    # of the result as well, where all else is as before
    result = torch.zeros(64 * 384 + 8).bfloat16()
    for offset in (0, 1, 8):
        out = result[offset : offset + 64 * 384].view(64, 384)
        wgrad(DY, X, slice(0, 64), out=out, backend="triton", config=config)
    variants = [one.variant for one in record.launches[-3:]]
    assert variants[0] == variants[2] != variants[1]


def table(*entries):
    return measured.Table(90, measured._by_kind(entries))


def use(monkeypatch, known):
    monkeypatch.setattr(measured, "for_capability", lambda capability: known)
    launches.forget()


def test_auto_is_cublas_until_a_table_says_otherwise(record, monkeypatch):
    for _ in range(2):
        wgrad(DY, X, slice(64, 192))
    assert record.launches == []
    problem = Problem(256, 128, 384)
    use(monkeypatch, table((problem, next(candidates(problem, H200)), 1.2)))
    for _ in range(2):
        wgrad(DY, X, slice(64, 192))
    assert len(record.launches) == 2
    # another start that is no multiple of 8, another sum, another result: not measured
    wgrad(DY, X, slice(67, 195))
    wgrad(DY, X, slice(64, 192), out_dtype=torch.float32)
    wgrad(DY, X, slice(64, 192), out=torch.zeros(128, 384).bfloat16(), accumulate=True)
    assert len(record.launches) == 2
    use(monkeypatch, table((problem, next(candidates(problem, H200)), 1.0)))
    wgrad(DY, X, slice(64, 192))
    assert len(record.launches) == 2


def test_a_choice_for_aligned_tensors_is_not_remembered_for_others(record, monkeypatch):
    """In either order: what is decided for one address must not answer for the other."""
    problem = Problem(256, 128, 384)
    use(monkeypatch, table((problem, next(candidates(problem, H200)), 1.2)))
    buffer = torch.randn(256 * 512 + 8).bfloat16()
    aligned, shifted = (buffer[at : at + 256 * 512].view(256, 512) for at in (0, 1))
    for order in ([aligned, shifted], [shifted, aligned]):
        launches.forget()
        del record.launches[:]
        for dy in order * 2:
            before = len(record.launches)
            wgrad(dy, X, slice(64, 192))
            assert len(record.launches) - before == (dy is aligned)


def test_auto_groups_go_where_the_choice_says(record, monkeypatch):
    dys, spans = [DY, DY.clone(), DY.clone()], [slice(0, 64), slice(64, 128), slice(8, 72)]
    outs = [torch.full((64, 384), float("nan")).bfloat16() for _ in range(3)]
    expected = [dy[:, span].t() @ X for dy, span in zip(dys, spans, strict=True)]
    for margin, launched in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(choice, "MODEL_MARGIN", margin)
        launches.forget()
        for _ in range(2):
            del record.launches[:]
            got = grouped_wgrad(dys, X, spans, outs=outs)
            assert len(record.launches) == launched
            if not launched:
                for one, right in zip(got, expected, strict=True):
                    torch.testing.assert_close(one, right, rtol=2e-2, atol=0.2)
    # tokens or columns that differ need a launch each: PyTorch
    del record.launches[:]
    grouped_wgrad([DY, DY[:100]] * 3, [X, X[:100]] * 3)
    assert record.launches == []


def test_small_slices_of_a_shared_input_are_one_product(record, monkeypatch):
    monkeypatch.setattr(choice, "MODEL_MARGIN", 1e9)
    launches.forget()
    ways = {}
    for rows in (16, 512):
        spans = [slice(0, rows)] * 3
        ways[rows] = grouped_choice.way_of_groups(
            [DY] * 3, [X] * 3, spans, [slice(0, 384)] * 3, None, False, DY.dtype, False, triton=True
        )
        got = grouped_wgrad([DY] * 3, X, spans)
        shared_memory = len({one.untyped_storage().data_ptr() for one in got}) == 1
        assert shared_memory == (ways[rows] == "by one product")
    assert ways[16] == "by one product"
    apart = grouped_wgrad([DY] * 3, [X, X.clone(), X], [slice(0, 16)] * 3)
    assert len({one.untyped_storage().data_ptr() for one in apart}) == 3


def test_auto_experts_go_where_the_choice_says(record, monkeypatch):
    offsets = torch.tensor([64, 64, 256], dtype=torch.int32)
    for margin, launched in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(choice, "MODEL_MARGIN", margin)
        # three are a few products; a table knows them
        for number, many in ((3, False), (8, True)):
            launches.forget()
            del record.launches[:]
            ends = torch.cat([offsets, offsets[-1:].expand(number - 3)])
            expert_wgrad(DY, X, ends, rows=slice(0, 64))
            assert len(record.launches) == (launched if many else 0)
    mean = replace(Problem(86, 64, 384, described=False), rows=192, parts=(64,) * 3)
    use(monkeypatch, table((mean, Config(64, 128, 64, 4, 3), 1.5)))
    del record.launches[:]
    expert_wgrad(DY, X, offsets, rows=slice(0, 64))
    assert len(record.launches) == 1


def failing():
    with empty_launches() as record:
        wgrad(DY, X, slice(0, 64), backend="triton")
        assert len(record.launches) == 1
        raise KeyError("out of the middle")


def test_the_driver_is_put_back():
    import triton

    before = triton.runtime.driver._active
    with pytest.raises(KeyError, match="out of the middle"):
        failing()
    assert triton.runtime.driver._active is before
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        wgrad(DY, X, slice(0, 64), backend="triton")
