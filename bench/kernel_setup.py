"""Operands of a case of `bench.kernels` on a device, the calls that are compared, and the check that comes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunkft.kernels import Blocks, expert_wgrad, grouped_wgrad, wgrad
from chunkft.kernels.heuristics import Config, Problem

from .kernel_cases import EXPERTS_A_TOKEN, Case

Run = Callable[[], Any]
SAMPLE = 64


def problem_of(case: Case) -> Problem:
    """What the picker is asked for a case; groups and experts are read through pointers."""
    if case.form == "group":
        return Problem(case.tokens, sum(case.rows), case.cols, described=False, parts=case.rows, shared=True)
    if case.form == "experts":
        each = -(-case.tokens * EXPERTS_A_TOKEN // case.experts)
        parts = case.rows * case.experts
        return Problem(each, sum(parts), case.cols, described=False, parts=parts)
    block = 64 if case.form == "blocks" else 0
    wide = {"out_itemsize": 4, "accumulate": True} if case.form == "accumulate" else {}
    return Problem(case.tokens, case.rows[0], case.cols, row_block=block, row_shift=case.start % 8, **wide)


def slack(tokens: int, out_bits: int) -> float:
    """What a sum over `tokens` may be off beside twice the other's distance, as a share of the largest result.

    Tensor cores add 16 products at a time to an fp32 sum and cut off what does not fit, so that the distance grows with
    the number of additions, and who splits the tokens has a smaller one: in fp32 results it is seen, in 16 bits not.
    """
    return max(1e-6, tokens / 16 * 2.0**-24 if out_bits == 32 else 0.0)


class Setup:
    """Operands of a case, and the calls that are compared; every call overwrites its own results.

    With `accumulate` the results are fp32 and every call adds to what is there, as micro-batches do.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        values: Callable[..., Tensor] = torch.randn,
    ) -> None:
        self.case = case
        tokens = case.tokens * (EXPERTS_A_TOKEN if case.form == "experts" else 1)
        self.accumulate = case.form == "accumulate"
        self.dys = [values(tokens, rows, device=device, dtype=dtype) for rows, _ in case.weights]
        self.x = values(tokens, case.cols, device=device, dtype=dtype)
        self.spans = [slice(case.start, case.start + rows) for rows in case.rows]
        shapes = [(rows, case.cols) for rows in case.rows]
        if case.form == "experts":
            ends = torch.randint(0, tokens + 1, (case.experts - 1,)).sort().values.tolist()
            self.offsets = torch.tensor([*ends, tokens], dtype=torch.int32, device=device)
            shapes = [(case.experts, *shapes[0])]
        if case.form == "blocks":
            blocks = torch.randperm(case.weights[0][0] // 64)[: case.rows[0] // 64]
            self.blocks = Blocks(blocks.to(device), 64)
        out = torch.float32 if self.accumulate else dtype
        self.ours = [torch.zeros(shape, dtype=out, device=device) for shape in shapes]
        if case.form == "group":  # one after another, so that one product can write all of them
            self.whole = torch.zeros(sum(case.rows), case.cols, dtype=out, device=device)
            self.theirs = list(self.whole.split(case.rows))
        else:
            self.theirs = [torch.zeros(shape, dtype=out, device=device) for shape in shapes]

    def chunkft(self, backend: str, config: Config | None = None) -> None:
        """The library's function, by a backend."""
        case, dy = self.case, self.dys[0]
        options: dict[str, Any] = {"backend": backend, "config": config}
        if case.form == "group":
            grouped_wgrad(self.dys, self.x, self.spans, outs=self.ours, **options)
        elif case.form == "experts":
            expert_wgrad(dy, self.x, self.offsets, rows=self.spans[0], out=self.ours[0], **options)
        else:
            rows = self.blocks if case.form == "blocks" else self.spans[0]
            wgrad(dy, self.x, rows, out=self.ours[0], accumulate=self.accumulate, **options)

    def torch(self) -> dict[str, Run]:
        """What PyTorch offers for the same result, by name; the fastest of them is what ours is held against."""
        form, dy = self.case.form, self.dys[0]
        if form == "experts":
            return {"grouped_mm": self._grouped_mm}
        if form == "blocks":
            return {"index_select": self._index_select}
        if form == "group":
            return {"mm": self._mm, "cat": self._cat}
        if form == "accumulate":
            span, out = self.spans[0], self.theirs[0]
            found: dict[str, Run] = {"add": lambda: out.add_(self._wide(dy[:, span]))}
            if dy.is_cuda:  # on a CPU it has no form with another output type
                found["addmm"] = lambda: torch.addmm(
                    out, dy[:, span].t(), self.x, out_dtype=torch.float32, out=out
                )
            return found
        return {"mm": self._mm}

    def _wide(self, dy: Tensor) -> Tensor:
        if dy.is_cuda:
            return torch.mm(dy.t(), self.x, out_dtype=torch.float32)
        return torch.mm(dy.t().float(), self.x.float())

    def _mm(self) -> None:
        for member, span, out in zip(self.dys, self.spans, self.theirs, strict=True):
            torch.mm(member[:, span].t(), self.x, out=out)

    def _cat(self) -> None:
        """One product of all slices side by side."""
        rows = torch.cat([dy[:, span] for dy, span in zip(self.dys, self.spans, strict=True)], dim=1)
        torch.mm(rows.t(), self.x, out=self.whole)

    def _index_select(self) -> None:
        dy = self.dys[0]
        parts = dy.view(dy.shape[0], -1, 64).index_select(1, self.blocks.index)
        torch.mm(parts.flatten(1).t(), self.x, out=self.theirs[0])

    def _grouped_mm(self) -> None:
        dy = self.dys[0][:, self.spans[0]]
        self.theirs[0] = torch._grouped_mm(dy.t(), self.x, offs=self.offsets)

    def exact(self, result: int) -> tuple[Tensor, tuple[Any, ...]]:
        """fp64 values of a sample of a result, and where they are in it."""
        rows = torch.randint(0, self.case.rows[result], (SAMPLE,))
        cols = torch.randint(0, self.case.cols, (SAMPLE,))
        x, dy = self.x[:, cols].double(), self.dys[result]
        if self.case.form == "experts":
            expert = int(torch.randint(0, self.case.experts, ()))
            ends = [0, *self.offsets.tolist()]
            tokens = slice(ends[expert], ends[expert + 1])
            source = dy[tokens][:, rows + self.spans[0].start].double()
            return source.t() @ x[tokens], (expert, rows[:, None], cols[None, :])
        if self.case.form == "blocks":
            index = self.blocks.index.cpu()
            source = dy[:, index[rows // 64] * 64 + rows % 64].double()
        else:
            source = dy[:, rows + self.spans[result].start].double()
        return source.t() @ x, (rows[:, None], cols[None, :])

    def check(self, run: Run) -> str:
        """Why a run of ours may not be timed; empty if it is as accurate as the first of PyTorch's."""
        start = 1.5 if self.accumulate else float("nan")  # a value that nobody wrote is seen
        for out in (*self.ours, *self.theirs):
            out.fill_(start)
        run()
        next(iter(self.torch().values()))()
        for i, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            exact, place = self.exact(i)
            exact = exact + start if self.accumulate else exact
            off = float((ours[place].double() - exact).abs().max())
            allowed = 2 * float((theirs[place].double() - exact).abs().max())
            allowed += slack(self.case.tokens, 8 * ours.element_size()) * (1 + float(exact.abs().max()))
            if not off <= allowed:
                return f"off by {off:.3g}, allowed {allowed:.3g}"
        return ""
