"""Launches every kernel once, in a range of NVTX named by kernel and shape, for the tools that watch a GPU.

make ncu                                     under Nsight Compute, at the shapes of Llama-2-7B
make sanitize-gpu                            under compute-sanitizer, at small shapes with tails
python -m bench.ncu_targets --list           the ranges and the kernels' configurations; needs no GPU
python -m bench.ncu_targets --rehearse       all of it at small shapes on the CPU, by the PyTorch backend

Of each weight: the weight gradient by the Triton kernel through pointers, through tensor descriptors (TMA) and with
split-K, in the configuration that the picker's model likes best of the kind, and by cuBLAS; of weights that share an
input, grouped, and by cuBLAS one by one and joined. Then AdamW over a chunk, and the rows of an embedding. Every call
is made once before its range, so that compilation and first allocations are not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import chunkft
from chunkft.kernels import adamw, embedding_grad, grouped_wgrad, wgrad
from chunkft.kernels.heuristics import Config, Problem, candidates, predict
from chunkft.kernels.targets import Target, target_of

from . import plain_llama
from .kernel_cases import Case, cases
from .kernels import problem_of

PREFIX = "ncu "  # the filter of `make ncu` takes in ranges that begin so
MODELS = ("llama-2-7b", "llama-3-8b")
FORMS = ("slice", "misaligned", "group")
SMALL = 8  # by how much `small` divides the sides of a weight
SMALL_TOKENS = 600  # no multiple of a tile, and enough for two ranges of split-K
Call = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Where calls run: a device, and whether Triton kernels run there."""

    device: str
    triton: bool

    @property
    def backend(self) -> str:
        """Of the functions of chunkft.kernels, for what stands for a Triton kernel."""
        return "triton" if self.triton else "torch"

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A random matrix; bf16, as the weights of the models."""
        return torch.randn(shape, device=self.device).to(dtype)


@dataclass(frozen=True)
class Job:
    """A call by the name of its range; `make` puts its operands on the device. `config`: of a Triton product."""

    name: str
    make: Callable[[Place], Call]
    config: Config | None = None

    def __post_init__(self) -> None:
        if any(sign in self.name for sign in ':"/\\'):
            raise ValueError(f'name is {self.name!r}; : " / and \\ have a meaning to ncu or in its CSV')

    def range(self, place: Place) -> AbstractContextManager[object]:
        """The range of NVTX around the call that is watched; none where there is no GPU."""
        return torch.cuda.nvtx.range(PREFIX + self.name) if place.device == "cuda" else nullcontext()


def small(case: Case) -> Case:
    """The case with sides so small that checked launches end in seconds, and with tails on all of them."""
    weights = tuple((rows // SMALL, cols // SMALL) for rows, cols in case.weights)
    rows = tuple(max(9, size // 4 + 1) for size in case.rows)
    start = case.start // 4 // 8 * 8 + case.start % 8
    return replace(case, tokens=SMALL_TOKENS, weights=weights, rows=rows, start=start)


def best(problem: Problem, target: Target, wanted: Callable[[Config], bool]) -> Config | None:
    """The wanted configuration of the least predicted time; None where there is none."""
    legal = [config for config in candidates(problem, target) if wanted(config)]
    return min(legal, key=lambda config: predict(config, problem, target).microseconds, default=None)


def products(case: Case, target: Target, tag: str) -> Iterator[Job]:
    """The weight gradients of a case; the kinds of kernel for which no configuration is legal are left out."""
    problem = problem_of(case)
    if case.form == "group":
        config = best(problem, target, lambda _: True)
        yield Job(f"wgrad-group {tag}", lambda place: _grouped(case, place, config), config)
        yield Job(f"cublas {tag}", lambda place: _cublas(case, place))
        yield Job(f"cublas-joined {tag}", lambda place: _joined(case, place))
        return
    # The picker reads through pointers only where a descriptor cannot be had.
    pointers = replace(problem, described=False)
    kinds = {
        "plain": best(pointers, target, lambda c: not c.tma and c.splits == 1),
        "tma": best(problem, target, lambda c: c.tma and c.splits == 1),
        "split": best(problem, target, lambda c: c.splits > 1),
    }
    for kind, config in kinds.items():
        if config is not None:
            yield Job(f"wgrad-{kind} {tag}", lambda place, c=config: _sliced(case, place, c), config)
    yield Job(f"cublas {tag}", lambda place: _cublas(case, place))


def _operands(case: Case, place: Place) -> tuple[list[Tensor], Tensor, list[slice], list[Tensor]]:
    """dY (T, M) of each weight, X (T, N), and of each slice its rows and a result (R, N)."""
    dys = [place.normal(case.tokens, rows) for rows, _ in case.weights]
    spans = [slice(case.start, case.start + rows) for rows in case.rows]
    outs = [place.normal(rows, case.cols) for rows in case.rows]
    return dys, place.normal(case.tokens, case.cols), spans, outs


def _sliced(case: Case, place: Place, config: Config) -> Call:
    (dy,), x, (rows,), (out,) = _operands(case, place)
    return lambda: wgrad(dy, x, rows, out=out, backend=place.backend, config=config if place.triton else None)


def _grouped(case: Case, place: Place, config: Config | None) -> Call:
    dys, x, spans, outs = _operands(case, place)
    config = config if place.triton else None
    return lambda: grouped_wgrad(dys, x, spans, outs=outs, backend=place.backend, config=config)


def _cublas(case: Case, place: Place) -> Call:
    dys, x, spans, outs = _operands(case, place)

    def call() -> list[Tensor]:
        for dy, span, out in zip(dys, spans, outs, strict=True):
            torch.mm(dy[:, span].t(), x, out=out)
        return outs

    return call


def _joined(case: Case, place: Place) -> Call:
    dys, x, spans, outs = _operands(case, place)
    out = torch.cat(outs)

    def call() -> Tensor:
        joined = torch.cat([dy[:, span] for dy, span in zip(dys, spans, strict=True)], dim=1)
        return torch.mm(joined.t(), x, out=out)

    return call


def updates(model: str, chunks: int, reduced: bool) -> Iterator[Job]:
    """AdamW over the slices of a chunk: bf16 with a residual by Triton, and the same sizes in fp32 by torch's."""
    with torch.device("meta"):
        plan = chunkft.partition(plain_llama.PlainLlama(plain_llama.SHAPES[model]), chunks)
    sizes = [part.numel for part in max(plan.chunks, key=lambda chunk: chunk.numel).slices]
    if reduced:
        sizes = [size // 4096 + 1 for size in sizes[:3]]
    tag = f"{len(sizes)} slices {sum(sizes)} elements"
    yield Job(f"adamw-triton bf16 {tag}", lambda place: _adamw(sizes, place))
    yield Job(f"adamw-torch fp32 {tag}", lambda place: _torch_adamw(sizes, place))


def _adamw(sizes: Sequence[int], place: Place) -> Call:
    params, grads = ([place.normal(size) for size in sizes] for _ in range(2))
    first, second = ([torch.zeros(size, device=place.device) for size in sizes] for _ in range(2))
    residuals = [torch.zeros(size, dtype=torch.int16, device=place.device) for size in sizes]
    steps = torch.zeros(len(sizes))
    options: dict[str, Any] = {"master": "residual", "residuals": residuals, "backend": place.backend}
    return lambda: adamw(params, grads, first, second, steps, lr=1e-4, **options)


def _torch_adamw(sizes: Sequence[int], place: Place) -> Call:
    params = [torch.nn.Parameter(place.normal(size, dtype=torch.float32)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return torch.optim.AdamW(params, lr=1e-4, fused=True).step


def lookups(model: str, chunks: int, tokens: int, reduced: bool, tag: str) -> Iterator[Job]:
    """The gradient of 1/K of the rows of an embedding."""
    tokens = SMALL_TOKENS if reduced else tokens
    shape = plain_llama.SHAPES[model]
    vocabulary, width = (
        (shape.vocab // 100, shape.hidden // 32 + 1) if reduced else (shape.vocab, shape.hidden)
    )
    rows = (vocabulary // chunks, 2 * (vocabulary // chunks) + 1)

    def make(place: Place, backend: str) -> Call:
        dy = place.normal(tokens, width)
        ids = torch.randint(0, vocabulary, (tokens,), device=place.device)
        return lambda: embedding_grad(dy, ids, vocabulary, rows=rows, backend=backend)

    yield Job(f"embedding-triton rows {tag}", lambda place: make(place, place.backend))
    yield Job(f"embedding-torch rows {tag}", lambda place: make(place, "torch"))


def jobs(
    model: str, chunks: int, tokens: int, forms: Sequence[str], target: Target, reduced: bool = False
) -> list[Job]:
    """Everything that is launched, in order; `reduced`: at small shapes."""
    found: list[Job] = []
    tag = "small" if reduced else f"K={chunks} T={tokens}"
    for case in cases((model,), (chunks,), (tokens,), tuple(forms)):
        kind = " misaligned" if case.form == "misaligned" else ""
        found += products(small(case) if reduced else case, target, f"{case.name}{kind} {tag}")
    found += updates(model, chunks, reduced)
    found += lookups(model, chunks, tokens, reduced, tag)
    return found


def chosen(found: Sequence[Job], words: Sequence[str] | None) -> list[Job]:
    """The jobs of which a word begins with one of `words`; all of them without. Raises ValueError where none does."""
    if not words:
        return list(found)
    kept = [job for job in found if any(part.startswith(tuple(words)) for part in job.name.split())]
    if not kept:
        names = ", ".join(sorted({job.name.split()[0] for job in found}))
        raise ValueError(f"--only {' '.join(words)} fits none of the names; they begin with {names}")
    return kept


def launch(job: Job, place: Place) -> None:
    """One call to warm up, one in the range."""
    call = job.make(place)
    call()
    _settle(place)
    with job.range(place):
        call()
    _settle(place)


def _settle(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.ncu_targets", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["slice", "group"])
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="what has a word in its name that begins so"
    )
    parser.add_argument("--small", action="store_true", help="small shapes with tails")
    parser.add_argument(
        "--rehearse", action="store_true", help="small shapes on the CPU, by the PyTorch backend"
    )
    parser.add_argument("--list", action="store_true", help="print names and configurations, launch nothing")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not args.rehearse
    if not (on_gpu or args.rehearse or args.list):
        parser.error("torch sees no GPU; --list and --rehearse need none")
    for name in ("chunks", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if on_gpu:
        from chunkft.kernels.triton_wgrad import target_for

        target = target_for(torch.device("cuda"))
    else:
        target = target_of(90)
    torch.manual_seed(0)
    found = jobs(args.model, args.chunks, args.tokens, args.forms, target, args.small or args.rehearse)
    try:
        wanted = chosen(found, args.only)
    except ValueError as error:
        parser.error(str(error))
    place = Place("cuda", True) if on_gpu else Place("cpu", False)
    for job in wanted:
        if not args.list:
            launch(job, place)
        print(f"{PREFIX}{job.name}" + (f"  {job.config}" if job.config else ""), flush=True)


if __name__ == "__main__":
    main()
