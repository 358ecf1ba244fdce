"""Bytes that a rank sends in a step, and bytes that it holds, when models are trained on many ranks: arithmetic alone.

One model for training in chunks (replicas, FSDP2, hybrid shards) and for what it is compared with. Nothing is measured
here: bench.scale holds the traffic against counted bytes of real processes, and bench.scale_time adds seconds.

Bytes sent are those of a ring or a direct exchange: a rank sends (W-1)/W of what it gathers, scatters or exchanges, and
twice that of what it all-reduces.

Where the formulas come from:
    in chunks            chunkft.parallel: gradients of the active slices go to their owners, each bucket with an
                         element for each of its slices in front; owners of replicas send their rows to all, padded to
                         the largest part of a bucket; copies of hybrid shards add up their sums in fp32.
    DDP, ZeRO-1, ZeRO-3  ZeRO (arXiv 1910.02054), sections 5 and 7: 16 bytes a parameter in mixed precision, of which
                         12 of state; volumes of 2, 2 and 3 times the parameters.
    FSDP2                torch 2.13, torch/distributed/fsdp/_fully_shard: rows of dim 0 are padded to equal shards, the
                         outermost group is not resharded after the forward pass, and a backward pass gathers one group
                         ahead of where it is, also of where it ends.
    BAdam on ZeRO-3      badam 1.4, block_optim.py: a block of the model is trainable, everything else frozen; ZeRO-3
                         reduce-scatters the gradients of the block and keeps fp32 weights and moments of its shard,
                         which begin anew at every switch. Embedding and head are no blocks unless asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil

CHUNKED = ("replicas", "fsdp2", "hybrid")
DENSE = ("ddp", "zero1", "zero3")
METHODS = (*CHUNKED, *DENSE, "badam")
SHARDED = ("fsdp2", "hybrid", "zero3", "badam")
MOMENTS = 8  # bytes a parameter: two in fp32
RESIDUAL = 2  # what the fp32 master of a 16-bit weight has more
DENSE_STATE = 12  # fp32 master and moments (ZeRO, section 5: its K)
BUCKET = 32 << 20  # bytes of gradients that leave together; a larger slice leaves alone
PAGES = 3 * (64 << 20)  # slots of state that passes through (residency="stream")
LOSS_TILE = 1 << 28  # bytes of logits at a time where the loss goes over the head in tiles


@dataclass(frozen=True)
class Weight:
    """A weight of `rows` x `columns`; a vector has one column."""

    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    def padded(self, ranks: int) -> int:
        """Elements with the rows that FSDP2 adds so that every rank has as many."""
        return ceil(self.rows / ranks) * ranks * self.columns


@dataclass(frozen=True)
class Shape:
    """A decoder in Llama's form: embedding, `layers` blocks, a norm and a head of its own.

    The defaults of `kv` and `vocab` are those of Llama 3.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int = 1024
    vocab: int = 128256

    @property
    def block(self) -> tuple[Weight, ...]:
        """Weights of one block, in the order of the model."""
        h, i = self.hidden, self.intermediate
        attention = (Weight(h, h), Weight(self.kv, h), Weight(self.kv, h), Weight(h, h))
        return (*attention, Weight(i, h), Weight(i, h), Weight(h, i), Weight(h, 1), Weight(h, 1))

    @property
    def rest(self) -> tuple[Weight, ...]:
        """Weights outside of the blocks: embedding, last norm, head."""
        return Weight(self.vocab, self.hidden), Weight(self.hidden, 1), Weight(self.vocab, self.hidden)

    @property
    def block_numel(self) -> int:
        """Elements of one block."""
        return sum(weight.numel for weight in self.block)

    @property
    def numel(self) -> int:
        """Elements of the model."""
        return self.layers * self.block_numel + sum(weight.numel for weight in self.rest)

    @property
    def stream(self) -> tuple[Weight, ...]:
        """All weights in the order of the model."""
        table, norm, head = self.rest
        return (table, *self.block * self.layers, norm, head)

    def reached(self, chunk: int, chunks: int) -> int:
        """Blocks that the backward pass goes through for a chunk of equal windows of the stream, embedding first."""
        start = chunk * self.numel / chunks
        table = self.rest[0].numel
        below = 0 if start < table else int((start - table) // self.block_numel)
        return max(0, self.layers - below)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8B", 32, 4096, 14336),  # huggingface.co/meta-llama/Llama-3.1-8B
        Shape("70B", 80, 8192, 28672),
        Shape("405B", 126, 16384, 53248),  # arXiv 2407.21783, table 3
    )
}


@cache
def windows(shape: Shape, chunks: int, interleaved: bool = False) -> tuple[tuple[Weight, ...], ...]:
    """The slices of each chunk: windows of the stream of equal numbers of elements, or 1/K of each weight.

    Cuts fall on whole rows; vectors are never cut, and belong to the window in which they end.
    """
    found: list[list[Weight]] = [[] for _ in range(chunks)]
    passed = 0
    for weight in shape.stream:
        near = (passed - weight.columns, passed + weight.numel + weight.columns)  # edges round to rows
        low, high = (int(place * chunks / shape.numel) for place in near)
        for chunk in range(chunks) if interleaved else range(max(0, low - 1), min(chunks, high + 1)):
            low, high = (
                _row(weight, passed, shape.numel, k, chunks, interleaved) for k in (chunk, chunk + 1)
            )
            if high > low:
                found[chunk].append(Weight(high - low, weight.columns))
        passed += weight.numel
    return tuple(map(tuple, found))


def _row(weight: Weight, passed: int, total: int, edge: int, chunks: int, interleaved: bool) -> int:
    """The row of a weight at which the chunk before the edge ends."""
    if weight.columns == 1 or not interleaved:
        row = (edge * total / chunks - passed) / weight.columns
        if weight.columns == 1:
            return weight.rows if row >= weight.rows else 0
        return min(weight.rows, max(0, round(row)))
    return weight.rows * edge // chunks


def buckets(pieces: Sequence[Weight], element: int) -> list[list[Weight]]:
    """Slices that leave together, from the end of the stream: as many as BUCKET holds, or one that is larger."""
    found: list[list[Weight]] = []
    filled = 0
    for piece in reversed(pieces):
        size = element * piece.numel
        if not found or filled + size > BUCKET:
            found.append([])
            filled = 0
        found[-1].append(piece)
        filled += size
    return found


def largest_part(bucket: Sequence[Weight], ranks: int) -> int:
    """Elements of the largest of the parts, of whole rows, that ranks own of a bucket; vectors are never cut."""
    width = max(piece.columns for piece in bucket)
    mean = sum(piece.numel for piece in bucket) / ranks
    vectors = [piece.numel for piece in bucket if piece.columns == 1]
    return max(ceil(mean / width) * width, *vectors, 0)


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        shape: of the model.
        method: one of METHODS.
        ranks: W.
        chunks: K; of BAdam the blocks are its chunks.
        tokens: of a rank in a step.
        interleaved: each chunk has 1/K of every weight, in place of a window of the stream.
        element: bytes of an element of weights and gradients.
        shard: ranks that hold one copy of the model together, in the method "hybrid".
        streamed: state passes through pages inside of every step, as with `residency="stream"`.
        apart: embedding and head are groups of FSDP2 of their own, which are resharded like blocks.

    Raises:
        ValueError: if the method is not known, a number is not allowed, or `shard` does not divide `ranks`.
    """

    shape: Shape
    method: str
    ranks: int
    chunks: int = 32
    tokens: int = 4096
    interleaved: bool = False
    element: int = 2
    shard: int = 8
    streamed: bool = False
    apart: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not known; allowed are {', '.join(METHODS)}")
        for name in ("ranks", "chunks", "tokens", "element", "shard"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; needs an integer >= 1")
        if self.method == "hybrid" and self.ranks % self.shards:
            raise ValueError(f"shard={self.shard} does not divide ranks={self.ranks}")

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the model together."""
        if self.method == "hybrid":
            return min(self.shard, self.ranks)
        return self.ranks if self.method in SHARDED else 1

    @property
    def copies(self) -> int:
        """Copies of the model."""
        return self.ranks // self.shards

    @property
    def owners(self) -> int:
        """Ranks among which a chunk is divided; copies of hybrid shards do the same update each."""
        return self.shards if self.method == "hybrid" else self.ranks

    @property
    def sweep(self) -> tuple[tuple[Weight, ...], ...]:
        """The slices with a gradient, for each chunk of a sweep."""
        if self.method == "badam":
            return (self.shape.block,) * self.shape.layers
        return windows(self.shape, self.chunks if self.method in CHUNKED else 1, self.interleaved)

    @property
    def active(self) -> float:
        """Elements with a gradient in a step, mean over a sweep."""
        return _mean([sum(piece.numel for piece in chunk) for chunk in self.sweep])

    @property
    def reached(self) -> tuple[int, ...]:
        """Blocks that the backward pass goes through, for each chunk of a sweep."""
        layers, parts = self.shape.layers, len(self.sweep)
        if self.method == "badam":
            return tuple(range(1, layers + 1))
        if parts == 1 or self.interleaved:
            return (layers,) * parts
        return tuple(self.shape.reached(chunk, parts) for chunk in range(parts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends in a step, mean over ranks and over a sweep, by what they are.

    Attributes:
        gradients: to their owners with their headers, or to be summed everywhere.
        weights: updated rows to those that do not own them.
        gathers: of FSDP2 or ZeRO-3, before the computation.
    """

    gradients: float = 0.0
    weights: float = 0.0
    gathers: float = 0.0

    @property
    def own(self) -> float:
        """Without the gathers, which belong to the sharding."""
        return self.gradients + self.weights

    @property
    def total(self) -> float:
        """All."""
        return self.own + self.gathers


def others(ranks: int) -> float:
    """(W-1)/W, the share of what is exchanged that does not stay."""
    return (ranks - 1) / ranks


def traffic(setting: Setting) -> Traffic:
    """Bytes that a rank sends in a step, which has one exchange however many backward passes.

    Norm, finite flag and the check of the schedule are left out: tens of bytes.
    """
    gradient = setting.element * setting.active
    share = others(setting.ranks)
    if setting.method in CHUNKED:
        owners = setting.owners
        headers = setting.element * (owners - 1) * _mean([len(chunk) for chunk in setting.sweep])
        sums = 2 * others(setting.copies) * 4 * setting.active / owners if setting.method == "hybrid" else 0.0
        return Traffic(
            gradients=others(owners) * gradient + headers + sums,
            weights=_spread(setting) if setting.method == "replicas" else 0.0,
            gathers=gathers(setting),
        )
    if setting.method == "ddp":
        return Traffic(gradients=2 * share * gradient)
    if setting.method == "zero1":
        return Traffic(gradients=share * gradient, weights=share * gradient)
    if setting.method == "zero3":  # rows that pad a shard are reduced too
        gradient = setting.element * sum(weight.padded(setting.ranks) for weight in setting.shape.stream)
    return Traffic(gradients=share * gradient, gathers=gathers(setting))


def _spread(setting: Setting) -> float:
    """Bytes of updated rows: every rank sends as many as the one that owns most of a bucket."""
    ranks, element = setting.ranks, setting.element
    rows = [sum(largest_part(b, ranks) for b in buckets(chunk, element)) for chunk in setting.sweep]
    return (ranks - 1) * element * _mean(rows)


def gathers(setting: Setting) -> float:
    """Bytes that a rank sends of its shard for the forward and the backward pass, 0 where nothing is sharded."""
    shape, shards = setting.shape, setting.shards
    forward = sum(weight.padded(shards) for weight in shape.stream)
    return others(shards) * setting.element * (forward + _gathered_again(setting))


def _gathered_again(setting: Setting) -> float:
    """Elements that are gathered for a backward pass, mean over a sweep: the blocks it goes through, and one ahead."""
    shape, shards = setting.shape, setting.shards
    block = sum(weight.padded(shards) for weight in shape.block)
    again = block * _mean([min(shape.layers, blocks + 1) for blocks in setting.reached])
    return again + (shape.rest[-1].padded(shards) if setting.apart else 0)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank holds at most, by kind.

    Attributes:
        weights: the replica, or the shard.
        gathered: two blocks, one of them ahead, and embedding and head, which FSDP2 keeps from the forward to the
            backward pass (where they are groups of their own: a block and one of the two).
        gradients: of the active slices, and the sums of the own ones.
        buffers: what is on its way: two buckets out and two in.
        state: of the own rows of the active chunk, or pages of it.
        activations: inputs of the checkpointed blocks, what one block recomputes, a tile of logits.
        host: paged state of the own rows of all chunks, in host memory.
    """

    weights: float
    gathered: float
    gradients: float
    buffers: float
    state: float
    activations: float
    host: float

    @property
    def device(self) -> float:
        """All that is on the device."""
        held = self.weights + self.gathered + self.gradients + self.buffers
        return held + self.state + self.activations


def memory(setting: Setting) -> Memory:
    """Bytes of a rank in training with activation checkpointing, in the largest of its chunks."""
    shape, element, ranks = setting.shape, setting.element, setting.ranks
    active = max(sum(piece.numel for piece in chunk) for chunk in setting.sweep)
    gradient = element * active
    if setting.method in CHUNKED:
        state = MOMENTS + (RESIDUAL if element == 2 else 0)
        # `gradient` is what accumulates before the exchange
        held, own = gradient, state * active / setting.owners
        held += 0 if ranks == 1 else gradient / setting.owners
        own = min(own, PAGES) if setting.streamed else own
        host = state * shape.numel / setting.owners
    else:
        # ZeRO-3 keeps a shard of the gradients; DDP and ZeRO-1 (P_os) all of them
        held = gradient / ranks if setting.method in SHARDED else gradient
        own, host = DENSE_STATE * active / (1 if setting.method == "ddp" else ranks), 0.0
    return Memory(
        weights=element * shape.numel / setting.shards,
        gathered=_gathered(setting),
        gradients=held,
        buffers=0.0 if ranks == 1 else 4.0 * min(BUCKET, gradient),
        state=own,
        activations=activations(setting),
        host=host,
    )


def _gathered(setting: Setting) -> float:
    """Bytes of whole weights that a rank holds at a time, beside its shard."""
    shards = setting.shards
    if shards == 1:
        return 0.0
    block = sum(weight.padded(shards) for weight in setting.shape.block)
    rest = [weight.padded(shards) for weight in setting.shape.rest]
    if setting.apart:
        return setting.element * float(max(2 * block, block + max(rest)))
    return setting.element * float(2 * block + sum(rest))


def activations(setting: Setting) -> float:
    """Bytes of activations with every block checkpointed, attention that keeps no scores, the loss in tiles."""
    shape, tokens = setting.shape, setting.tokens
    inputs = shape.layers * shape.hidden
    # two norms, query, attention, its projection, keys and values; gate, up, SiLU, product and two gradients of them
    block = 5 * shape.hidden + 2 * shape.kv + 6 * shape.intermediate
    logits = min(6.0 * tokens * shape.vocab, LOSS_TILE)  # 16 bit and fp32
    return float(2 * tokens * (inputs + block)) + logits


def own_bound(setting: Setting) -> float:
    """Bytes that are promised to be the most of our own in a step: 4N/K for replicas, 2N/K for shards, in 16 bit.

    Raises:
        ValueError: if the method has no such promise.
    """
    if setting.method not in ("replicas", "fsdp2"):
        raise ValueError(f"method={setting.method!r} has no bound; allowed are 'replicas' and 'fsdp2'")
    passes = 2 if setting.method == "replicas" else 1
    return passes * setting.element * setting.shape.numel / setting.chunks
