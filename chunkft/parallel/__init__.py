"""Many processes: who owns which part of a chunk, what ranks send each other, and weights that FSDP2 shards."""

from chunkft.parallel.fsdp import ShardedWeights, is_sharded
from chunkft.parallel.loss import token_mean
from chunkft.parallel.owners import Bucket, Ownership, make_buckets, padded
from chunkft.parallel.ranks import KINDS, Ranks, cpu_channel_of, objects_of
from chunkft.parallel.reducer import Reducer
from chunkft.parallel.shards import expand, owner_of, rows_of, shard_specs
from chunkft.parallel.shown import DividedGradients
from chunkft.parallel.spreading import spread

__all__ = [
    "KINDS",
    "Bucket",
    "DividedGradients",
    "Ownership",
    "Ranks",
    "Reducer",
    "ShardedWeights",
    "cpu_channel_of",
    "expand",
    "is_sharded",
    "make_buckets",
    "objects_of",
    "owner_of",
    "padded",
    "rows_of",
    "shard_specs",
    "spread",
    "token_mean",
]
