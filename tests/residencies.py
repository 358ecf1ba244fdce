"""The places that optimizer state can live in, and training with it in memory to compare with."""

import chunkft

PAGE = 1024
MODES = {
    "paged": {"state_device": "paged"},
    "stream": {"residency": "stream", "page_bytes": PAGE},
    "backward": {"residency": "stream", "page_bytes": PAGE, "update": "backward"},
    "one-page-a-slice": {"residency": "stream", "page_bytes": 1},
}
FILES = {
    "paged-files": {"state_device": "paged"},
    "stream-files": {"residency": "stream", "page_bytes": PAGE},
    "backward-files": {"residency": "stream", "page_bytes": PAGE, "update": "backward"},
}


def in_memory(model, plan, build, **options):
    """The same training without paging, on the same slices."""
    return build(model, chunks=None, partition=plan, **options)


def adamw(model, **options):
    return chunkft.ChunkAdamW(model, **{"lr": 1e-2, "interval": 2, **options})
