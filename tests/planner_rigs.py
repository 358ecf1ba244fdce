"""What training steps on a CPU really hold, counted storage by storage, to hold the planner's promises against."""

import torch

import chunkft
from chunkft.optim.forecast import weight_nbytes
from chunkft.optim.paged import PagedStore
from chunkft.profiling.ledger import Ledger

HOST = "host"


def counted_peak(model, arguments, step, **batch):
    """The most bytes at a time of weights, slots, and all that operators made, over a sweep of one step a chunk.

    A sweep before it is not counted: on a CPU, where no kernel makes it in its slot, new state lies beside its page
    until the chunk rests. Host memory of the state is not counted either: it is in arenas, which no operator makes.
    """
    on_host = arguments.get("update_on") == "host"
    place = "auto" if on_host else "paged"
    optimizer = chunkft.ChunkAdamW(model, lr=1e-4, interval=1, state_device=place, **arguments)
    try:
        attachment, store = optimizer._attachment, optimizer._store
        assert isinstance(store, PagedStore) != on_host
        fixed = weight_nbytes(attachment)["weights"]
        fixed += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        fixed += 0 if on_host else sum(pager.stats().device_bytes for pager in store.pagers.values())
        ledger = None

        def sweep():
            for _ in range(len(optimizer.plan)):
                loss = step(model, **batch)
                loss.backward()
                del loss
                if ledger is not None and on_host:
                    for piece, leaf in attachment.active():
                        if attachment.on_host(piece.name) and leaf.grad is not None:
                            ledger.label(leaf.grad, HOST)
                    ledger.phase = HOST  # the update works in host memory
                optimizer.step()
                if ledger is not None:
                    ledger.phase = "forward"

        sweep()
        ledger = Ledger(model, torch.device("cpu"), lambda: 0, lambda: None)
        with ledger:
            copies = getattr(attachment.wiring.residence, "_copies", {})
            for piece in copies:
                ledger.present(copies[piece], "leaves")
            ledger.phase = "forward"
            sweep()
        blocks = [block for block in ledger.blocks if HOST not in (block.category, block.phase)]
        freed = [(block.freed, -block.nbytes) for block in blocks if block.freed is not None]
        live = most = 0
        for _, change in sorted([(block.born, block.nbytes) for block in blocks] + freed):
            live += change
            most = max(most, live)
        # those that a step saves for its backward pass are in the ledger, others are not
        counted = {block.shape for block in blocks if block.op == "made before"}
        rest = [t for t in batch.values() if tuple(t.shape) not in counted]
        return fixed + most + sum(t.numel() * t.element_size() for t in rest)
    finally:
        optimizer.detach()
