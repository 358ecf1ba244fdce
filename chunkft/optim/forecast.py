"""What training will hold, from the plan, the dtypes and the update rule alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from chunkft.attach import Attachment
from chunkft.autograd import Slice
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.kernel_slices import kernel_applies
from chunkft.optim.master import STATE_KEYS
from chunkft.optim.paged import PagedStore
from chunkft.optim.pages import Layout, StateProbe, make_pages, state_nbytes
from chunkft.optim.streamed import StreamResidency
from chunkft.plan import ChunkPlan
from chunkft.streaming import file_tier_nbytes

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

MASTER_KEYS = frozenset(STATE_KEYS.values())


def predict(
    optimizer: ChunkOptimizer, plan: ChunkPlan, seen: ChunkPlan | None = None
) -> dict[str, int | None]:
    """The most bytes of each kind that exist at a time in a run from its start over all chunks of ``plan``.

    Of many ranks, ``plan`` is what this one owns, and ``seen`` that of all, whose gradients each of them computes.

    A parameter that never gets a gradient is counted as if it did. With ``update="backward"`` gradients are taken to
    come in the reverse order of the stream, those of all active slices of a parameter at once. State is None if the
    base optimizer could not be probed.
    """
    attachment = optimizer._attachment
    weight_of = attachment.parameter
    counted = weight_nbytes(attachment)
    found: dict[str, int | None] = {
        **counted,
        "leaves": _beside(attachment, plan),
        "gradients": gradient_peak(optimizer, plan if seen is None else seen),
        "gradients_host": max(
            sum(
                piece.numel * weight_of(piece.name).element_size()
                for piece in [*plan.always, *chunk.slices]
                if attachment.on_host(piece.name)
            )
            for chunk in plan.chunks
        ),
    }
    store = optimizer._store
    probe = store.probe if isinstance(store, PagedStore) else StateProbe(optimizer._residency.rule, weight_of)
    layouts = {piece: probe.layout(piece) for piece in plan.slices()}
    if probe.failure is not None:
        return found | dict.fromkeys(("state_device", "masters", "state_new", "state_host", "state_files"))
    if isinstance(store, PagedStore):
        return found | _paged(optimizer, plan, store, layouts)
    return found | _in_memory(optimizer, plan, layouts)


def predict_full(optimizer: ChunkOptimizer) -> dict[str, int | None]:
    """Bytes of each kind in full fine-tuning with the same base optimizer: gradients of the weights' dtype, fp32
    masters of 16-bit weights, everything on the device.
    """
    attachment = optimizer._attachment
    weight_of = attachment.parameter
    known = {spec.name for spec in attachment.specs}
    whole_weights = [
        weight_of(name) if name in known else p for name, p in attachment.model.named_parameters()
    ]
    probe = StateProbe(optimizer._residency.rule, weight_of)
    state = gradients = masters = 0
    for name, shape in {piece.name: piece.parameter_shape for piece in optimizer.plan.slices()}.items():
        weight = weight_of(name)
        whole = Slice(name, None, 0, shape[0] if shape else 1, shape)
        gradients += weight.numel() * weight.element_size()
        masters += weight.numel() * 4 if weight.element_size() == 2 else 0
        state += _tensors(probe.layout(whole), masters=False)
    counted = probe.failure is None
    return {
        "weights": sum(p.numel() * p.element_size() for p in whole_weights),
        "leaves": 0,
        "weights_host": 0,
        "gradients": gradients,
        "gradients_host": 0,
        "state_device": state if counted else None,
        "masters": masters,
        "state_new": 0,
        "state_host": 0,
        "state_files": 0,
    }


def weight_nbytes(attachment: Attachment) -> dict[str, int]:
    """Bytes of the weights by where they are, as they are now."""
    residence = attachment.wiring.residence
    if residence is None:
        total = sum(p.numel() * p.element_size() for p in attachment.model.parameters())
        return {"weights": total, "leaves": 0, "weights_host": 0}
    memory = residence.memory()
    on_device = memory["resident"] + memory["ring"] + memory["tiles"]
    return {"weights": on_device, "leaves": residence.nbytes(), "weights_host": memory["host"]}


def _beside(attachment: Attachment, plan: ChunkPlan) -> int:
    """The most bytes of leaves that are copies of parts of weights."""
    residence = attachment.wiring.residence
    if residence is None or not residence.copies:
        return 0
    size = {name: p.element_size() for name, p in attachment.model.named_parameters()}
    return max(
        sum(
            piece.numel * size[piece.name]
            for piece in [*plan.always, *chunk.slices]
            if piece.dim is not None and residence.streams(piece.name)
        )
        for chunk in plan.chunks
    )


def _in_memory(
    optimizer: ChunkOptimizer, plan: ChunkPlan, layouts: dict[Slice, Layout]
) -> dict[str, int | None]:
    held = {}
    on_host = optimizer._attachment.on_host
    for name, masters in (("state_device", False), ("masters", True)):
        always = sum(_tensors(layouts[p], masters=masters) for p in plan.always if not on_host(p.name))
        chunks = [
            sum(_tensors(layouts[p], masters=masters) for p in chunk.slices if not on_host(p.name))
            for chunk in plan.chunks
        ]
        stays = not optimizer._store.in_arena and (optimizer._keep_state or masters)
        held[name] = always + (sum(chunks) if stays else max(chunks))
    # What is updated in host memory is there from its first update on, in the arena or before it.
    alone = len(plan) == 1 and optimizer._keep_state
    host = sum(
        state_nbytes(_vectors(layouts[piece]))
        for piece in [*plan.always, *(plan.chunks[0].slices if alone else ())]
        if on_host(piece.name)
    )
    if optimizer._store.in_arena and (len(plan) > 1 or not optimizer._keep_state):
        for chunk in plan.chunks:
            for piece in chunk.slices:
                layout = _vectors(layouts[piece])
                if not optimizer._keep_state:
                    layout = {key: value for key, value in layout.items() if key in MASTER_KEYS}
                host += state_nbytes(layout)
    return {**held, "state_new": 0, "state_host": host, "state_files": 0}


def _paged(
    optimizer: ChunkOptimizer, plan: ChunkPlan, store: PagedStore, layouts: dict[Slice, Layout]
) -> dict[str, int | None]:
    stream = isinstance(optimizer._residency, StreamResidency)
    groups: list[Sequence[Slice]] = [chunk.slices for chunk in plan.chunks]
    if stream:
        groups.insert(0, plan.always)
    attachment = optimizer._attachment
    pages = make_pages(groups, store.probe, attachment.leaf_device, store.page_bytes)
    sizes: dict[torch.device, list[int]] = {}
    for page in pages:
        sizes.setdefault(page.device, []).append(page.nbytes)
    slots = host = files = 0
    for found in sizes.values():
        count = store.slots_for(len(found))
        slots += count * max(found)
        if store.state_dir is None:
            host += sum(found)
        else:
            buffers, on_disk = file_tier_nbytes(found, count)
            host, files = host + buffers, files + on_disk
    pairs = [(piece, attachment.sample(piece.name)) for piece in plan.slices()]
    together = [page.pieces for page in pages] if stream else [chunk.slices for chunk in plan.chunks]
    new = 0
    if not kernel_applies(pairs, optimizer._residency.rule):  # the kernel makes new state in the slot
        new = max(
            (
                sum(_tensors(layouts[p], masters=m) for p in pieces for m in (False, True))
                for pieces in together
            ),
            default=0,
        )
    resting = () if stream else plan.always
    return {
        "state_device": slots + sum(_tensors(layouts[piece], masters=False) for piece in resting),
        "masters": sum(_tensors(layouts[piece], masters=True) for piece in resting),
        "state_new": new,
        "state_host": host,
        "state_files": files,
    }


def gradient_peak(
    optimizer: ChunkOptimizer, plan: ChunkPlan, page_of: Mapping[Slice, int] | None = None
) -> int:
    """The most bytes of gradients at a time: those of a chunk, or where updates are part of the backward pass those
    that wait for the rest of their page.

    Args:
        optimizer: that of the model.
        plan: the chunks.
        page_of: page of each slice, for updates in the backward pass; None asks the optimizer whether it does that.
    """
    weight_of = optimizer._attachment.parameter

    on_host = optimizer._attachment.on_host

    def nbytes(pieces: Iterable[Slice]) -> int:
        return sum(p.numel * weight_of(p.name).element_size() for p in pieces if not on_host(p.name))

    active = [[*plan.always, *chunk.slices] for chunk in plan.chunks]
    if page_of is None:
        if not isinstance(optimizer._residency, BackwardResidency):
            return max(nbytes(pieces) for pieces in active)
        assert isinstance(optimizer._store, PagedStore)
        page_of = optimizer._store.page_of
    most = 0
    for pieces in active:
        missing: dict[object, set[Slice]] = {}
        by_name: dict[str, list[Slice]] = {}
        for piece in pieces:
            missing.setdefault(page_of.get(piece, piece), set()).add(piece)
            by_name.setdefault(piece.name, []).append(piece)
        units = {unit: nbytes(members) for unit, members in missing.items()}
        held = 0
        for name in reversed(by_name):
            held += nbytes(by_name[name])
            most = max(most, held)
            for piece in by_name[name]:
                unit = page_of.get(piece, piece)
                missing[unit].discard(piece)
                if not missing[unit]:
                    held -= units[unit]
    return most


def _tensors(layout: Layout, *, masters: bool) -> int:
    """Bytes of the tensors of a layout that are masters, or of the others; scalars are left out."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for key, (shape, dtype) in _vectors(layout).items()
        if (key in MASTER_KEYS) == masters
    )


def _vectors(layout: Layout) -> Layout:
    return {key: (shape, dtype) for key, (shape, dtype) in layout.items() if shape}
