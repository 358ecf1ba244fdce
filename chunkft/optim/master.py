"""Master weights: what a 16-bit weight needs so that small updates are not lost."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.kernels import apply_residual, split_residual, stochastic_round

MASTERS = ("auto", "fp32", "residual", "stochastic", "none")
STATE_KEYS = {"fp32": "master", "residual": "residual"}
MASTER_DTYPES = {"fp32": torch.float32, "residual": torch.int16}


def resolve_master(master: str, dtype: torch.dtype) -> str:
    """The master mode of a weight of this dtype.

    Args:
        master: ``"fp32"``: an fp32 copy in the state, 4 bytes per element; ``"residual"``: the 16 bits of the
            fp32 master that a bf16 weight lacks, 2 bytes, exact; ``"stochastic"``: stochastic rounding of bf16
            weights, 0 bytes; ``"none"``: updates in the weight's own precision; ``"auto"``: residual for bf16,
            fp32 for fp16, none for fp32 and fp64.
        dtype: of the weight.

    Raises:
        ValueError: if the mode is not known, or not possible for the dtype.
    """
    if master not in MASTERS:
        raise ValueError(f"master={master!r} is not known; allowed are {', '.join(map(repr, MASTERS))}")
    if dtype in (torch.float32, torch.float64) or master == "none":
        return "none"
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"parameters of dtype {dtype} cannot be trained; allowed are float64/32/16 and bfloat16"
        )
    if master == "auto":
        return "residual" if dtype == torch.bfloat16 else "fp32"
    if dtype == torch.float16 and master in ("residual", "stochastic"):
        raise ValueError(
            f"master={master!r} needs bfloat16 weights, got float16; allowed are 'fp32' and 'none'"
        )
    return master


class WorkingWeight:
    """The tensor that the base optimizer updates in place of one leaf.

    With mode ``none`` that is the leaf itself, or a contiguous copy of it if the leaf is strided and the base
    optimizer cannot be trusted with strides; otherwise an fp32 parameter. Copies exist between ``open`` and ``close``
    only, unless it is the stored master.

    Args:
        piece: the slice.
        leaf: its leaf.
        mode: master mode.
        state: what is known of the slice; masters are taken out of it.
        dense: the base optimizer reads value, gradient and state as contiguous memory.
    """

    def __init__(
        self, piece: Slice, leaf: nn.Parameter, mode: str, state: dict[str, Any], dense: bool = False
    ) -> None:
        self.piece = piece
        self.leaf = leaf
        self.mode = mode
        self.extra: dict[str, Tensor] = {}
        self._dense = dense
        self._direct = mode == "none" and not (dense and not leaf.is_contiguous())
        if dense:
            # Kept state may have been made for, or by, something that minds strides.
            state.update(
                {
                    key: value.contiguous()
                    for key, value in state.items()
                    if isinstance(value, Tensor) and not value.is_contiguous()
                }
            )
        if self._direct:
            self.parameter = leaf
            return
        key = STATE_KEYS.get(mode)
        if mode == "fp32":
            master = state.pop("master", None)
            if master is None:
                master = leaf.detach().float()
            self.extra["master"] = master.contiguous() if dense else master
        elif mode == "residual":
            residual = state.pop("residual", None)
            self.extra["residual"] = torch.zeros(leaf.shape, dtype=torch.int16, device=leaf.device)
            if residual is not None:
                self.extra["residual"] = residual
        self._dtype = leaf.dtype if mode == "none" else torch.float32
        self.parameter = nn.Parameter(
            torch.empty(0, dtype=self._dtype, device=leaf.device), requires_grad=False
        )
        self.parameter.requires_grad_(True)
        assert key is None or key in self.extra

    def open(self) -> None:
        """Make the fp32 value, and the gradient if there is one, available to the base optimizer."""
        if self._direct:
            if self._dense and self.leaf.grad is not None and not self.leaf.grad.is_contiguous():
                self.leaf.grad = self.leaf.grad.contiguous()
            return
        weight = self.leaf.detach()
        if self.mode == "fp32":
            master = self.extra["master"]
            # A weight that was changed by others (loaded, clamped) wins over its master.
            torch.where(master.to(weight.dtype) == weight, master, weight.float(), out=master)
            self.parameter.data = master
        elif self.mode == "residual":
            residual = self.extra["residual"]
            # Zero has no neighbour below in its bits: with the residual of another value it would become NaN.
            residual.masked_fill_((weight == 0) & (residual < 0), 0)
            self.parameter.data = apply_residual(weight, residual)
        elif self.mode == "none":
            self.parameter.data = weight.contiguous()
        else:
            self.parameter.data = weight.float()
        if self._dense:
            self.parameter.data = self.parameter.data.contiguous()
        if self.leaf.grad is not None:
            gradient = self.leaf.grad if self.mode == "none" else self.leaf.grad.float()
            self.parameter.grad = gradient.contiguous() if self._dense else gradient

    def close(self, seed: str | None) -> None:
        """Write the updated value back into the leaf (not if ``seed`` is None) and let go of the copy."""
        if self._direct:
            return
        value = self.parameter.data
        self.parameter.grad = None
        self.parameter.data = torch.empty(0, dtype=self._dtype, device=self.leaf.device)
        if seed is None or self.leaf.grad is None:
            return
        if self.mode == "none":
            self.leaf.detach().copy_(value)
        elif self.mode == "fp32":
            self.leaf.detach().copy_(value)
            master = self.extra["master"]
            if value.data_ptr() != master.data_ptr():  # the base optimizer assigned .data
                master.copy_(value)
        elif self.mode == "residual":
            weight, residual = split_residual(value)
            self.leaf.detach().copy_(weight)
            self.extra["residual"].copy_(residual)
        else:
            self.leaf.detach().copy_(stochastic_round(value, noise_seed(seed, self.piece)))


def noise_seed(seed: str, piece: Slice) -> int:
    """Seed of the stochastic rounding of one slice in one step, below 2^56."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{piece}".encode(), digest_size=7).digest())
