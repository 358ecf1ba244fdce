"""Modules of ``fully_shard`` (FSDP2), which hold whole parameters, gathered, in place of shards for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_STATE = "torch.distributed.fsdp._fully_shard._fsdp_state"


def sharded_groups(model: nn.Module) -> Iterator[Any]:
    """The ``FSDPParamGroup`` of each ``fully_shard`` in a model, those of outer modules first."""
    library: Any = sys.modules.get(_STATE)
    if library is None:  # nobody can have sharded anything
        return
    seen: set[int] = set()
    for module in model.modules():
        state = library._get_module_fsdp_state(module)
        if state is None or id(state) in seen:
            continue
        seen.add(id(state))
        yield from groups_of(state)


def groups_of(state: Any) -> list[Any]:
    """The groups of parameters of one ``fully_shard``; torch 2.11 has one at most."""
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def reshard(model: nn.Module) -> None:
    """Let every module hold its shards again, as after an evaluation, which leaves the outermost one gathered.

    Groups with a part in a forward or backward pass that runs stay as they are.
    """
    reshard_groups(sharded_groups(model))


def reshard_groups(groups: Iterable[Any]) -> None:
    """The same for some groups."""
    for group in groups:
        if group._training_state.name != "IDLE":
            continue
        if group._all_gather_result is not None:  # begun ahead of a forward pass that did not come
            group.wait_for_unshard()
        if not group.is_sharded:
            group.reshard()
