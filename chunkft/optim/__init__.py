"""Optimizers over chunks, and their checkpoints."""

from chunkft.optim.adamw import ChunkAdamW
from chunkft.optim.checkpoint import load_checkpoint, save_checkpoint
from chunkft.optim.chunk_optimizer import ChunkOptimizer
from chunkft.optim.parts import merge_states
from chunkft.optim.planner import MemoryPlan, plan_memory
from chunkft.optim.report import MemoryPart, MemoryReport
from chunkft.optim.sharded_checkpoint import ShardedState, load_sharded, save_sharded

__all__ = [
    "ChunkAdamW",
    "ChunkOptimizer",
    "MemoryPart",
    "MemoryPlan",
    "MemoryReport",
    "ShardedState",
    "load_checkpoint",
    "load_sharded",
    "merge_states",
    "plan_memory",
    "save_checkpoint",
    "save_sharded",
]
