"""Weights that several processes hold: shards of FSDP2."""

from chunkft.parallel.fsdp import ShardedWeights, is_sharded
from chunkft.parallel.shards import expand, owner_of, rows_of, shard_specs

__all__ = ["ShardedWeights", "expand", "is_sharded", "owner_of", "rows_of", "shard_specs"]
