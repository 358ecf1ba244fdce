"""What an update of some slices is made from, shared by everything that runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class UpdateRule:
    """The base optimizer, its groups and the precision of each parameter.

    Attributes:
        base: class of the base optimizer.
        make_base: builds the base optimizer from groups.
        groups: the groups of the outer optimizer, whose values the base optimizer shares.
        group_of: index of each parameter's group, by name.
        modes: master mode of each parameter, by name.
        first_moment: dtype that AdamW keeps its first moment in, or None for that of the update.
        host_kernel: whether the native core updates AdamW's slices in host memory, in one pass: those of weights that
            stream to a GPU, and those with state of 8 bits.
        state_bits: bits of each moment of AdamW: 32, or 8 for codes with scales (``chunkft.kernels.companding``).
    """

    base: type[torch.optim.Optimizer]
    make_base: Callable[[Groups], torch.optim.Optimizer]
    groups: Groups
    group_of: Mapping[str, int]
    modes: Mapping[str, str]
    first_moment: torch.dtype | None = None
    state_bits: int = 32
    host_kernel: bool = False

    def values(self) -> Groups:
        """The hyper-parameters of every group as they are now, without the parameters."""
        return [{key: value for key, value in group.items() if key != "params"} for group in self.groups]

    def needs_contiguous(self, name: str) -> bool:
        """Whether the base may take the memory of a parameter for contiguous, whatever its strides.

        Fused kernels of torch do on a CPU, and those of other packages may; torch's other implementations are made of
        operators that mind strides.
        """
        own = self.base.__module__.startswith("torch.optim.")
        return not own or bool(self.groups[self.group_of[name]].get("fused"))
