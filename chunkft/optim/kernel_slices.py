"""AdamW on a GPU: all active slices in one launch, without fp32 copies of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.kernels import gpu
from chunkft.kernels.adamw import adamw
from chunkft.optim.active import ActiveSlices
from chunkft.optim.eight_bit import moment_layout
from chunkft.optim.master import STATE_KEYS, noise_seed
from chunkft.optim.rule import UpdateRule
from chunkft.optim.state import State, tensor_nbytes

SPECIAL = ("amsgrad", "maximize", "differentiable", "capturable", "foreach", "fused")
Home = Callable[[Slice, str], Tensor | None]


class KernelSlices:
    """``ActiveSlices`` for ``torch.optim.AdamW``, whose update ``chunkft.kernels.adamw`` does.

    State keys, dtypes and step counts are those of ``torch.optim.AdamW``, so that checkpoints go from one to the
    other.

    Args:
        pairs: each active slice with its leaf.
        states: what is known of each slice.
        rule: how they are updated.
        home: tells the memory that new state of a slice is to lie in, by its key; None for memory of its own.
    """

    def __init__(
        self,
        pairs: list[tuple[Slice, nn.Parameter]],
        states: dict[Slice, State],
        rule: UpdateRule,
        home: Home,
    ) -> None:
        self._home = home
        self._rule = rule
        self._eight = rule.state_bits == 8
        self._leaves = dict(pairs)
        self._states = {piece: dict(states[piece]) for piece in self._leaves}

    def step(self, seed: str, found_inf: Tensor | None = None) -> None:
        """Update every slice that has a gradient; ``seed`` names the noise of stochastic rounding.

        With ``found_inf``, a float32 tensor of one element, nothing happens if that is not zero; step counts are then
        beside their weights.
        """
        together: dict[tuple[int, str, torch.device], list[Slice]] = {}
        for piece, leaf in self._leaves.items():
            if leaf.grad is not None:
                self._begin(piece, leaf)
                key = (self._rule.group_of[piece.name], self._rule.modes[piece.name], leaf.device)
                together.setdefault(key, []).append(piece)
        for (number, mode, _), pieces in together.items():
            self._update(self._rule.groups[number], mode, pieces, seed, found_inf)

    def states(self) -> dict[Slice, State]:
        """State and master of each slice, the tensors themselves."""
        return {piece: dict(state) for piece, state in self._states.items()}

    def masters(self) -> dict[Slice, State]:
        """Only what belongs to the weights."""
        return {
            piece: {key: value for key, value in state.items() if key in STATE_KEYS.values()}
            for piece, state in self._states.items()
        }

    def show(self, target: MutableMapping[Tensor, State]) -> None:
        """Put the state of each leaf into ``target``, in place of what was there."""
        target.clear()
        for piece, state in self._states.items():
            own = {key: value for key, value in state.items() if key not in STATE_KEYS.values()}
            if own:
                target[self._leaves[piece]] = own

    def follow_devices(self) -> None:
        """Bring state to where its leaf is now."""
        for piece, state in self._states.items():
            device = self._leaves[piece].device
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.device != device:
                    state[key] = value.to(device)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the moments, and of the masters."""
        masters = self.masters()
        both = sum(tensor_nbytes(state) for state in self._states.values())
        extra = sum(tensor_nbytes(state) for state in masters.values())
        return both - extra, extra

    def _begin(self, piece: Slice, leaf: nn.Parameter) -> None:
        """State of a slice that is updated for the first time."""
        state = self._states[piece]
        mode = self._rule.modes[piece.name]
        dtype = leaf.dtype if mode == "none" else torch.float32
        if "step" not in state:
            place = self._home(piece, "step")
            state["step"] = torch.zeros((), dtype=torch.float32) if place is None else place.zero_()
        shape = tuple(leaf.shape)
        moments = {"exp_avg": (shape, self._rule.first_moment or dtype), "exp_avg_sq": (shape, dtype)}
        for key, (size, kept) in (moment_layout(shape) if self._eight else moments).items():
            if key not in state:
                state[key] = self._new(piece, key, leaf, kept, size).zero_()
        if mode == "fp32" and "master" not in state:
            state["master"] = self._new(piece, "master", leaf, torch.float32).copy_(leaf.detach())
        if mode == "residual" and "residual" not in state:
            state["residual"] = self._new(piece, "residual", leaf, torch.int16).zero_()

    def _new(
        self,
        piece: Slice,
        key: str,
        leaf: nn.Parameter,
        dtype: torch.dtype,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        shape = tuple(leaf.shape) if shape is None else shape
        place = self._home(piece, key)
        if (
            place is not None
            and place.shape == shape
            and place.dtype == dtype
            and place.device == leaf.device
        ):
            return place
        if self._eight:  # blocks follow the order of the elements, whatever the strides of the weight
            return torch.empty(shape, dtype=dtype, device=leaf.device)
        return torch.empty_like(leaf, dtype=dtype, memory_format=torch.preserve_format).detach()

    def _update(
        self,
        group: Mapping[str, Any],
        mode: str,
        pieces: list[Slice],
        seed: str,
        found_inf: Tensor | None,
    ) -> None:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        states = [self._states[piece] for piece in pieces]
        leaves = [self._leaves[piece] for piece in pieces]
        adamw(
            [leaf.detach() for leaf in leaves],
            [leaf.grad for leaf in leaves if leaf.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=group["lr"],
            betas=(beta1, beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            residuals=[state["residual"] for state in states] if mode == "residual" else None,
            masters=[state["master"] for state in states] if mode == "fp32" else None,
            master=mode,
            exp_avg_scales=[state["exp_avg_scale"] for state in states] if self._eight else None,
            exp_avg_sq_scales=[state["exp_avg_sq_scale"] for state in states] if self._eight else None,
            found_inf=found_inf,
            seed=[noise_seed(seed, piece) for piece in pieces],
            backend="host" if self._rule.host_kernel and all(map(_in_one_pass, leaves)) else "auto",
        )


def make_slices(
    pairs: list[tuple[Slice, nn.Parameter]], states: dict[Slice, State], rule: UpdateRule, home: Home
) -> ActiveSlices | KernelSlices:
    """The slices with the best update for them: the kernel where it computes what was asked for."""
    if kernel_applies(pairs, rule):
        return KernelSlices(pairs, states, rule, home)
    return ActiveSlices(pairs, states, rule)


def kernel_applies(pairs: Sequence[tuple[Slice, Tensor]], rule: UpdateRule) -> bool:
    """Whether ``chunkft.kernels.adamw`` does these updates: plain AdamW of weights on a GPU, or beside one.

    A group that names an implementation (``fused``, ``foreach``, ``capturable``) gets that one. Moments that torch does
    not know are the kernel's everywhere.
    """
    if rule.first_moment is not None or rule.state_bits == 8:
        return True
    plain = rule.base is torch.optim.AdamW and not any(special_options(group) for group in rule.groups)
    return plain and all(_on_gpu(leaf) or (rule.host_kernel and _on_host(leaf)) for _, leaf in pairs)


def special_options(group: Mapping[str, Any]) -> list[str]:
    """Options of AdamW in a group that the kernel leaves to torch."""
    return [name for name in SPECIAL if group.get(name)]


def _in_one_pass(leaf: Tensor) -> bool:
    """Whether the native core takes a leaf: in host memory, contiguous, or columns of a matrix."""
    return _on_host(leaf) and (leaf.is_contiguous() or (leaf.dim() == 2 and leaf.stride(1) == 1))


def _on_host(leaf: Tensor) -> bool:
    return leaf.is_cpu and leaf.dtype != torch.float64


def _on_gpu(leaf: Tensor) -> bool:
    return leaf.is_cuda and gpu.runs_on(leaf) and leaf.dtype != torch.float64
