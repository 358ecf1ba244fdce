"""Continuing from saved optimizer state: all of it, or nothing if anything is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.arguments import probe_base
from chunkft.optim.damage import check_groups, check_structure, check_values, working_dtype
from chunkft.optim.paging import PagingMeter
from chunkft.optim.parts import from_part
from chunkft.optim.recut import Origins, merged, near, new_state, recut, renamed
from chunkft.optim.resident import ChunkResidency
from chunkft.optim.serialize import FORMAT, PART_FORMAT
from chunkft.optim.state import State, StateStore, detached
from chunkft.optim.switch import Switch, settle, watch
from chunkft.optim.together import gathers_of, shared, together
from chunkft.plan import ChunkPlan, check_plan
from chunkft.schedule import active_chunk

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

LOADING = "loading the optimizer's state"


@dataclass
class Restored:
    """Everything that loading changes in an optimizer."""

    plan: ChunkPlan
    store: StateStore
    groups: list[dict[str, Any]]
    interval_index: int
    interval_position: int
    updates: int
    skipped: int
    gradients: dict[Slice, Tensor]
    passes: int  # backward passes of a step, 0 if that is not known


def read_state(optimizer: ChunkOptimizer, saved: Any) -> Restored:
    """Check a state_dict and cut it for this optimizer, which stays as it is.

    Args:
        optimizer: the one to continue.
        saved: a ``state_dict``; its tensors may also be lazy slices of a safetensors file.

    Raises:
        ValueError: if it is damaged, or not of this model, base optimizer or master mode.
    """
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if found not in (FORMAT, PART_FORMAT):
        raise ValueError(
            f"state_dict has format {found!r}; allowed is {FORMAT!r}, made by state_dict() of chunkft"
        )
    try:
        if found == PART_FORMAT:
            saved = from_part(saved)
        check_structure(saved["state"])
        saved = renamed(saved, [piece.name for piece in optimizer.plan.slices()])
        if found == PART_FORMAT:
            _check_part(optimizer, saved)
        _check_header(optimizer, saved)
        return _read(optimizer, saved)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"state_dict is damaged: an entry is missing or of the wrong kind ({type(error).__name__}: {error})"
        ) from error


def restore_together(optimizer: ChunkOptimizer, read: Callable[[], tuple[Restored, str]]) -> None:
    """Go on from what was read; in a team on all ranks, or on none if one of them could not read.

    Args:
        optimizer: the one to continue.
        read: checks and reads; gives also a mark that is the same on all ranks if they read the same.

    Raises:
        What ``read`` raises, on any rank; nothing is changed then.
        ValueError: if ranks read different checkpoints.
    """
    team = optimizer._team
    rank = 0 if team is None else team.ranks.rank
    gathers = gathers_of(team, LOADING)
    restored, mark = together(gathers, rank, read)
    first = shared(gathers, mark)
    together(gathers, rank, partial(_check_mark, mark, first))
    together(gathers, rank, partial(restore, optimizer, restored))
    optimizer._replicas.forget_agreement()
    if team is not None:
        team.rounds.forget_agreement()


def _check_mark(mark: str, first: str) -> None:
    if mark != first:
        raise ValueError(
            "the ranks read different checkpoints: this one is not that of rank 0; give all of them the same one"
        )


def restore(optimizer: ChunkOptimizer, restored: Restored) -> None:
    """Go on from what was read; it was checked before, so that nothing here is refused.

    Paged state is read only now, into memory that was given back for it. If the system fails at that, there is no way
    back: the model is detached as it is.
    """
    try:
        _exchange(optimizer, restored)
    except BaseException as error:
        error.add_note("the optimizer gave up its state for the one to load and is detached; build a new one")
        optimizer.detach()
        raise
    settle(optimizer)
    for piece, leaf in optimizer._attachment.active():
        if piece in restored.gradients:
            leaf.grad = restored.gradients[piece].to(device=leaf.device, dtype=leaf.dtype, copy=True)
    optimizer._attachment.wiring.show_gradients()


def _exchange(optimizer: ChunkOptimizer, restored: Restored) -> None:
    optimizer._residency.forget()
    optimizer.state.clear()
    optimizer._store.clear()
    optimizer._store = restored.store
    optimizer._store.realise()
    optimizer._meter = PagingMeter()
    optimizer._residency.use(optimizer._store)
    optimizer._own_plan = restored.plan
    if optimizer._team is None:
        optimizer.plan = restored.plan
    else:
        optimizer._team.rounds.passes = restored.passes
    for group, loaded in zip(optimizer.param_groups, restored.groups, strict=True):
        group.update(loaded)
    optimizer.updates = restored.updates
    optimizer.skipped = restored.skipped
    watch(optimizer)
    optimizer._switch = Switch(
        restored.interval_index, restored.interval_position, changes=True, stashed=True
    )


def _read(optimizer: ChunkOptimizer, saved: dict[str, Any]) -> Restored:
    saved_plan = ChunkPlan.from_dict(saved["plan"])
    given = optimizer._given_plan
    if not saved_plan.chunks:
        raise ValueError("state_dict has a plan without chunks; needs at least one")
    team = optimizer._team
    ours = given if team is None else optimizer.plan
    same = merged(ours) == merged(saved_plan)
    state = saved["state"] if team is None else near(saved["state"], given)
    saved = {**saved, "state": state}
    # Shards have rows also of what one process has as a whole.
    atomic = {spec.name for spec in optimizer._specs if not spec.dims}
    of_shards = any(piece.dim is not None and piece.name in atomic for piece in saved_plan.slices())
    if same and team is None and not of_shards:
        check_plan(saved_plan, optimizer._specs)
    origins: Origins = {}
    # Slices may be cut to the pages, or the ranks, of this optimizer, which the saving one need not have had.
    kept = same and team is None and not of_shards and isinstance(optimizer._residency, ChunkResidency)
    plan = recut(saved_plan if kept else given, saved["state"], origins)
    position = saved["cursor"]
    index = _count(position, "interval_index")
    done = _count(position, "interval_position")
    if not same:
        index, done = index // len(saved_plan) * len(plan), 0
    gradients = _gradients(optimizer, saved.get("gradients", []), plan, index, same and team is None)
    groups = [
        detached({key: value for key, value in entry.items() if key != "params"})
        for entry in saved["param_groups"]
    ]
    check_groups(optimizer, groups)
    probe_base(
        optimizer._base_class,
        [{**ours, **theirs} for ours, theirs in zip(optimizer.param_groups, groups, strict=True)],
        optimizer._base_kwargs,
    )
    updates, skipped = _count(position, "updates"), _count(position, "skipped")
    passes = _count({"passes": 0, **position}, "passes")
    for piece, entry in origins.items():
        _check_range(saved["state"][piece.name], entry)
    check_values(optimizer, saved["state"], groups, None if team is None else plan)
    store = optimizer._store.successor(plan)
    try:
        for pieces in (plan.always, *(chunk.slices for chunk in plan.chunks)):
            store.load(partial(_new_states, optimizer, pieces, saved["state"], origins))
    except BaseException:
        store.clear()
        raise
    done = min(done, optimizer.interval - 1)  # the interval may have become shorter
    return Restored(plan, store, groups, index, done, updates, skipped, gradients, passes)


def _new_states(
    optimizer: ChunkOptimizer, pieces: Sequence[Slice], saved: dict[str, Any], origins: Origins
) -> dict[Slice, State]:
    bits = optimizer._residency.rule.state_bits
    return {
        piece: new_state(piece, saved[piece.name], origins[piece], bits, working_dtype(optimizer, piece.name))
        for piece in pieces
        if piece in origins
    }


def _check_range(saved: dict[str, Any], entry: dict[str, Any]) -> None:
    """Raise KeyError or AttributeError for what ``new_state`` could not read, before anything is given up for it."""
    entry["values"].items()
    for key in entry["elementwise"]:
        saved["tensors"][key]


def _gradients(
    optimizer: ChunkOptimizer, entries: list[dict[str, Any]], plan: ChunkPlan, index: int, same: bool
) -> dict[Slice, Tensor]:
    """Gradients of an open accumulation window, by the slice that they belong to."""
    if not entries:
        return {}
    active = active_chunk(optimizer._schedule, index, len(plan), optimizer._seed)
    pieces = {(p.name, p.dim, p.start, p.stop): p for p in (*plan.always, *plan.chunks[active].slices)}
    found = {}
    for entry in entries:
        piece = pieces.get((entry["name"], entry["dim"], entry["start"], entry["stop"])) if same else None
        if piece is None:
            raise ValueError(
                "state_dict was taken inside of an accumulation window, whose gradients belong to the active chunk "
                "of that run; load it with the same partition, schedule and seed, or save right after step()"
            )
        if tuple(entry["tensor"].shape) != piece.shape:
            raise ValueError(
                f"state_dict has a gradient of shape {tuple(entry['tensor'].shape)} for {piece}, "
                f"which has shape {piece.shape}"
            )
        found[piece] = entry["tensor"].detach()
    return found


def _check_part(optimizer: ChunkOptimizer, saved: dict[str, Any]) -> None:
    """Raise ValueError for the state of one rank, if this is another one, or ranks share the state in another way."""
    team = optimizer._team
    rank, ranks = saved["part"]["rank"], saved["part"]["ranks"]
    plan = ChunkPlan.from_dict(saved["plan"])
    here = None if team is None else (team.ranks.rank, team.ranks.size)
    if here != (rank, ranks) or (plan.always, plan.chunks) != (optimizer.plan.always, optimizer.plan.chunks):
        raise ValueError(
            f"state_dict is the part of rank {rank} of {ranks}, and can be loaded by this rank of so many with the "
            "same plan only; join the parts of all ranks by chunkft.merge_states([...]), or save by full_state_dict(), "
            "chunkft.save_checkpoint or chunkft.save_sharded, which other numbers of ranks can load"
        )


def _check_header(optimizer: ChunkOptimizer, saved: dict[str, Any]) -> None:
    if saved["base"] != optimizer._base_class.__name__:
        raise ValueError(
            f"state_dict is of base {saved['base']!r}, this optimizer has {optimizer._base_class.__name__!r}"
        )
    shapes = {piece.name: piece.parameter_shape for piece in optimizer.plan.slices()}
    members = [name for group in saved["param_groups"] for name in group["params"]]
    if set(members) != set(shapes):
        only = sorted(set(members) ^ set(shapes))[0]
        where = "state_dict" if only in members else "model"
        raise ValueError(f"state_dict is of another model: {only!r} is trained in the {where} only")
    if len(saved["param_groups"]) != len(optimizer.param_groups) or any(
        optimizer._group_of[name] != i
        for i, group in enumerate(saved["param_groups"])
        for name in group["params"]
    ):
        raise ValueError("state_dict has its parameters in other groups than this optimizer")
    for name, entry in saved["state"].items():
        if tuple(entry["shape"]) != shapes[name]:
            raise ValueError(
                f"state_dict has {name!r} of shape {tuple(entry['shape'])}, the model has {shapes[name]}"
            )
        for key, tensor in entry["tensors"].items():
            shape = tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())
            if shape != shapes[name]:
                raise ValueError(
                    f"state_dict has {key!r} of {name!r} of shape {shape}, the model has {shapes[name]}"
                )
    for name, mode in optimizer._modes.items():
        if saved["master"][name] != mode:
            raise ValueError(
                f"state_dict has master={saved['master'][name]!r} for {name!r}, this optimizer {mode!r}"
            )


def _count(cursor: dict[str, Any], key: str) -> int:
    value = cursor[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"state_dict has {key}={value!r}; needs an integer >= 0")
    return value
