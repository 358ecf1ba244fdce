"""Full-parameter fine-tuning of language models on GPUs that are far too small for it."""

from typing import TYPE_CHECKING, Any

from chunkft.activations import saved_activations
from chunkft.attach import Attachment, attach
from chunkft.autograd import Slice
from chunkft.optim import (
    ChunkAdamW,
    ChunkOptimizer,
    MemoryPlan,
    MemoryReport,
    load_checkpoint,
    plan_memory,
    save_checkpoint,
)
from chunkft.parallel import token_mean
from chunkft.partitions import partition
from chunkft.plan import Chunk, ChunkPlan, ParameterSpec
from chunkft.weights import WeightStream

if TYPE_CHECKING:
    from chunkft.integrations.streamed import load_streamed, save_streamed

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Chunk",
    "ChunkAdamW",
    "ChunkOptimizer",
    "ChunkPlan",
    "MemoryPlan",
    "MemoryReport",
    "ParameterSpec",
    "Slice",
    "WeightStream",
    "attach",
    "load_checkpoint",
    "load_streamed",
    "partition",
    "plan_memory",
    "save_checkpoint",
    "save_streamed",
    "saved_activations",
    "token_mean",
]


def __getattr__(name: str) -> Any:
    # these need transformers, whose import takes seconds
    if name in ("load_streamed", "save_streamed"):
        from chunkft.integrations import streamed

        return getattr(streamed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
