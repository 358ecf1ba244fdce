"""The rows of a data set that a rank takes of each global batch."""

from collections.abc import Sequence
from typing import Any

import torch

from chunkft.cli.data import IGNORED

__all__ = ["RankRows", "targets_of"]


class RankRows(torch.utils.data.Dataset[Any]):
    """A data set of which a loader with batches of ``world * batch`` rows gets the share of one rank.

    Rank r takes rows [r * batch, (r + 1) * batch) of each global batch. Where the last one of an epoch has none left
    for it, it takes a row of which nothing is learned, so that all ranks do the same number of passes.

    Args:
        rows: of dicts with ``input_ids`` and ``labels``; a datasets.Dataset, or any that is read by number.
        rank: whose share.
        batch: rows of a rank.
    """

    def __init__(self, rows: Any, rank: int, batch: int) -> None:
        self.rows = rows
        self.rank = rank
        self.batch = batch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a loader reads of a global batch, whose rows have these numbers."""
        own = indices[self.rank * self.batch : (self.rank + 1) * self.batch]
        if not own:
            return [_nothing_of(self.rows[indices[0]])]
        read = getattr(self.rows, "__getitems__", None)
        return list(read(own)) if read is not None else [self.rows[index] for index in own]


def _nothing_of(row: dict[str, Any]) -> dict[str, Any]:
    labels = IGNORED if isinstance(row["labels"], int) else [IGNORED]
    return {"input_ids": row["input_ids"][:1], "labels": labels}


def targets_of(batch: dict[str, torch.Tensor]) -> int:
    """How many labels of a batch count in its loss: tokens behind the first of each row, or classes."""
    labels = batch["labels"]
    return int((labels[:, 1:] if labels.dim() == 2 else labels).ne(IGNORED).sum())
