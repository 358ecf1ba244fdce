"""Chooses how a model is trained on a machine, and says what that holds and how fast it is, from shapes alone."""

from chunkft.optim.planner.planning import plan_memory
from chunkft.optim.planner.result import Alternative, MemoryPlan
from chunkft.optim.planner.sizes import parse_rate, parse_size

__all__ = ["Alternative", "MemoryPlan", "parse_rate", "parse_size", "plan_memory"]
