"""Optimizers over chunks, and their checkpoints."""

from chunkft.optim.adamw import ChunkAdamW
from chunkft.optim.checkpoint import load_checkpoint, save_checkpoint
from chunkft.optim.chunk_optimizer import ChunkOptimizer
from chunkft.optim.planner import MemoryPlan, plan_memory
from chunkft.optim.report import MemoryPart, MemoryReport

__all__ = [
    "ChunkAdamW",
    "ChunkOptimizer",
    "MemoryPart",
    "MemoryPlan",
    "MemoryReport",
    "load_checkpoint",
    "plan_memory",
    "save_checkpoint",
]
