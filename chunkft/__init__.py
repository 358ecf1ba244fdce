"""Full-parameter fine-tuning of language models on GPUs that are far too small for it."""

from typing import TYPE_CHECKING, Any

from chunkft.activations import saved_activations
from chunkft.attach import Attachment, attach
from chunkft.autograd import Slice
from chunkft.optim import ChunkAdamW, ChunkOptimizer, MemoryReport, load_checkpoint, save_checkpoint
from chunkft.partitions import partition
from chunkft.plan import Chunk, ChunkPlan, ParameterSpec

if TYPE_CHECKING:
    from chunkft.integrations.streamed import load_streamed, save_streamed

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Chunk",
    "ChunkAdamW",
    "ChunkOptimizer",
    "ChunkPlan",
    "MemoryReport",
    "ParameterSpec",
    "Slice",
    "attach",
    "load_checkpoint",
    "load_streamed",
    "partition",
    "save_checkpoint",
    "save_streamed",
    "saved_activations",
]


def __getattr__(name: str) -> Any:
    # these need transformers, whose import takes seconds
    if name in ("load_streamed", "save_streamed"):
        from chunkft.integrations import streamed

        return getattr(streamed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
