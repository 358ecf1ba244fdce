"""What training steps on a CPU really hold, counted storage by storage, for the planner's promises to be held against."""

import gc

import torch

import chunkft
from chunkft.optim.paged import PagedStore
from chunkft.profiling.ledger import Ledger


def counted_peak(model, arguments, step, *, steps=None, **batch):
    """The most bytes at a time of weights, slots, and everything that operators made, over a sweep of two steps a chunk.

    Host memory of the state is not counted: it is in arenas, which no operator makes.
    """
    optimizer = chunkft.ChunkAdamW(model, lr=1e-4, interval=2, state_device="paged", **arguments)
    try:
        store = optimizer._store
        assert isinstance(store, PagedStore)
        slots = sum(pager.stats().device_bytes for pager in store.pagers.values())
        fixed = slots + sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        gc.collect()
        gc.disable()
        ledger = Ledger(model, torch.device("cpu"), lambda: 0, lambda: None)
        with ledger:
            ledger.phase = "forward"
            for _ in range(2 * len(optimizer.plan) if steps is None else steps):
                loss = step(model, **batch)
                loss.backward()
                del loss
                optimizer.step()
        events = sorted(
            [(block.born, block.nbytes) for block in ledger.blocks]
            + [(block.freed, -block.nbytes) for block in ledger.blocks if block.freed is not None]
        )
        live = most = 0
        for _, change in events:
            live += change
            most = max(most, live)
        batches = sum(t.numel() * t.element_size() for t in batch.values() if isinstance(t, torch.Tensor))
        return fixed + most + batches
    finally:
        gc.enable()
        optimizer.detach()
