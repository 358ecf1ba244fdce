"""What training steps on a CPU really hold, counted storage by storage, to hold the planner's promises against."""

import torch

import chunkft
from chunkft.optim.paged import PagedStore
from chunkft.profiling.ledger import Ledger


def counted_peak(model, arguments, step, **batch):
    """The most bytes at a time of weights, slots, and all that operators made, over a sweep of one step a chunk.

    A sweep before it is not counted: on a CPU, where no kernel makes it in its slot, new state lies beside its page
    until the chunk rests. Host memory of the state is not counted either: it is in arenas, which no operator makes.
    """
    optimizer = chunkft.ChunkAdamW(model, lr=1e-4, interval=1, state_device="paged", **arguments)
    try:
        store = optimizer._store
        assert isinstance(store, PagedStore)
        slots = sum(pager.stats().device_bytes for pager in store.pagers.values())
        fixed = slots + sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

        def sweep():
            for _ in range(len(optimizer.plan)):
                loss = step(model, **batch)
                loss.backward()
                del loss
                optimizer.step()

        sweep()
        ledger = Ledger(model, torch.device("cpu"), lambda: 0, lambda: None)
        with ledger:
            ledger.phase = "forward"
            sweep()
        freed = [(block.freed, -block.nbytes) for block in ledger.blocks if block.freed is not None]
        live = most = 0
        for _, change in sorted([(block.born, block.nbytes) for block in ledger.blocks] + freed):
            live += change
            most = max(most, live)
        # those that a step saves for its backward pass are in the ledger, others are not
        counted = {block.shape for block in ledger.blocks if block.op == "made before"}
        rest = [t for t in batch.values() if tuple(t.shape) not in counted]
        return fixed + most + sum(t.numel() * t.element_size() for t in rest)
    finally:
        optimizer.detach()
