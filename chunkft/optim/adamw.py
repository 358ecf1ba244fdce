"""AdamW, one chunk at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chunkft.optim.arguments import ModelOrGroups, check_adamw
from chunkft.optim.chunk_optimizer import ChunkOptimizer
from chunkft.optim.kernel_slices import special_options
from chunkft.optim.memory import DEFAULT_PAGE_BYTES
from chunkft.optim.planner.budget import DEFAULT_CHUNKS
from chunkft.optim.rule import UpdateRule
from chunkft.partitions import Partition
from chunkft.schedule import Schedule
from chunkft.weights import WeightStream


class ChunkAdamW(ChunkOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over chunks (ChunkFT, arXiv 2605.21177).

    Each slice has moments and a step count of its own, which survive while other chunks are active. With one
    chunk the trajectory is that of ``torch.optim.AdamW``, bit for bit in fp32.

    A parameter is updated in 1/K of the steps, so the learning rate wants to be larger than that of full
    fine-tuning; docs/quality.md has the measured rule.

    Args:
        model: a module, or parameter groups of a module on which ``chunkft.attach`` was called.
        lr: learning rate; a float or a tensor.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        fused: the fused implementation of ``torch.optim.AdamW``; None takes its default.
        foreach: its implementation over lists of tensors; None takes its default.
        first_moment: ``"bf16"`` keeps the first moment in bf16, 2 bytes less of 8 to 12 per element, at the cost of a
            relative rounding error of at most 2^-8 at each update, which decays with beta1. The second moment is
            never rounded so: its relative change per step, 1 - beta2, would get lost.
        state_bits: 8 keeps both moments as codes of 8 bits with a scale for each block of 128 elements, 2.0625 bytes an
            element in place of 8 (``chunkft.kernels.companding``); the update itself is computed in fp32. Needs weights
            of 16 or 32 bits.

    The other keywords are those of ``ChunkOptimizer``.

    Raises:
        TypeError, ValueError: as for ``ChunkOptimizer``; the model is left as it was.
    """

    def __init__(
        self,
        model: ModelOrGroups,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        chunks: int | None = DEFAULT_CHUNKS,
        memory_budget: int | str | None = None,
        memory_tokens: int = 1024,
        interval: int = 50,
        partition: Partition = "bytes",
        schedule: Schedule = "cyclic",
        slice_dim: int = 0,
        always_active: str | Sequence[str] | None = None,
        keep_state: bool = True,
        max_grad_norm: float | None = None,
        master: str = "auto",
        state_device: str = "auto",
        residency: str = "chunk",
        update: str = "step",
        fused: bool | None = None,
        foreach: bool | None = None,
        first_moment: str = "fp32",
        state_bits: int = 32,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        weights: str | WeightStream = "auto",
        update_on: str = "auto",
        resident_blocks: int = 0,
        weights_dir: str | os.PathLike[str] | None = None,
        offload_inputs: bool = False,
        device: torch.device | str = "auto",
        state_dir: str | os.PathLike[str] | None = None,
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay)
        implementation = {"fused": fused, "foreach": foreach}
        if first_moment not in ("fp32", "bf16"):
            raise ValueError(f"first_moment={first_moment!r} is not known; allowed are 'fp32' and 'bf16'")
        if isinstance(state_bits, bool) or state_bits not in (8, 32):
            raise ValueError(f"state_bits={state_bits!r} is not allowed; allowed are 8 and 32")
        if state_bits == 8 and first_moment == "bf16":
            raise ValueError(
                "state_bits=8 cannot be combined with first_moment='bf16': it keeps both moments in 8 bits"
            )
        self._first_moment = torch.bfloat16 if first_moment == "bf16" else None
        self._state_bits = int(state_bits)
        super().__init__(
            model,
            torch.optim.AdamW,
            chunks=chunks,
            memory_budget=memory_budget,
            memory_tokens=memory_tokens,
            interval=interval,
            partition=partition,
            schedule=schedule,
            slice_dim=slice_dim,
            always_active=always_active,
            keep_state=keep_state,
            max_grad_norm=max_grad_norm,
            master=master,
            state_device=state_device,
            residency=residency,
            update=update,
            page_bytes=page_bytes,
            weights=weights,
            update_on=update_on,
            resident_blocks=resident_blocks,
            weights_dir=weights_dir,
            offload_inputs=offload_inputs,
            device=device,
            state_dir=state_dir,
            process_group=process_group,
            seed=seed,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            **{name: value for name, value in implementation.items() if value is not None},
        )

    def _rule(self) -> UpdateRule:
        if self._first_moment is not None or self._state_bits == 8:
            asked = "state_bits=8" if self._state_bits == 8 else "first_moment='bf16'"
            kept = (
                "does not know moments of 8 bits"
                if self._state_bits == 8
                else "keeps both moments in one dtype"
            )
            for number, group in enumerate(self.param_groups):
                special = special_options(group)
                if special:
                    raise ValueError(
                        f"{asked} cannot be combined with {special[0]}={group[special[0]]!r} in parameter group "
                        f"{number}: torch.optim.AdamW, whose option that is, {kept}"
                    )
        if self._state_bits == 8:
            for spec in self._specs:
                if self._attachment.model.get_parameter(spec.name).dtype == torch.float64:
                    raise ValueError(
                        f"state_bits=8 cannot be used with float64 weights, as {spec.name!r} is: updates from "
                        "moments of 8 bits are computed in fp32"
                    )
        return replace(super()._rule(), first_moment=self._first_moment, state_bits=self._state_bits)
