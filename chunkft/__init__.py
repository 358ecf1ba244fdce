"""Full-parameter fine-tuning of language models on GPUs that are far too small for it."""

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
from chunkft.partitions import partition
from chunkft.plan import Chunk, ChunkPlan, ParameterSpec

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
    "attach",
    "load_checkpoint",
    "partition",
    "plan_memory",
    "save_checkpoint",
    "saved_activations",
]
