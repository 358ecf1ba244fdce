"""Seconds of a step on many ranks, from the bytes of bench.scale_model and given rates, and where scaling ends.

Everything is a lower bound that a good implementation comes near: computation at one rate, copies at another, both at
the same time where one does not need the other.

    ring       gathers, scatters, all-reduces. In a node at the rate of its links; over nodes every card brings a
               part of the bytes in and the ranks of a node pass them on: a byte comes into a node once.
    exchange   all-to-all: what goes to ranks of other nodes passes the card of its sender; nothing is shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

from . import scale_model
from .scale_model import CHUNKED, Setting, gathers, traffic


@dataclass(frozen=True)
class Cluster:
    """Rates of a machine, all of them as they are reached and not as they are advertised.

    Attributes:
        name: of the machine.
        flops: of products in 16 bit, a rank.
        inside: bytes a second of a rank to others of its node.
        between: bytes a second of a rank to other nodes: its share of the node's cards.
        message: seconds that a message costs its sender, however short.
        launch: seconds of the host for a copy of rows, of which FSDP2 wants one for each rank and weight.
        node: ranks of a node.
        memory: bytes of a rank's device.
    """

    name: str
    flops: float
    inside: float
    between: float
    message: float = 2e-6
    launch: float = 5e-6
    node: int = 8
    memory: int = 80 << 30


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("fast", 400e12, 350e9, 45e9),  # eight cards of 400 Gb/s a node, NVLink
        Cluster("modest", 120e12, 20e9, 1.4e9, memory=48 << 30),  # one card of 100 Gb/s a node, PCIe
    )
}


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """A step by its parts, in seconds; those of a pass overlap, passes follow each other.

    Attributes:
        forward, backward: computation.
        gather_forward, gather_backward: copies of weights for it.
        gradients: their exchange, during the backward pass.
        latency: what its messages cost beside, however short they are.
        weights: updated rows, after the backward pass.
        host: copies that the host launches in the backward pass.
    """

    forward: float
    backward: float
    gather_forward: float
    gather_backward: float
    gradients: float
    latency: float
    weights: float
    host: float

    @property
    def compute(self) -> float:
        """Computation alone."""
        return self.forward + self.backward

    @property
    def step(self) -> float:
        """What takes longest of each pass, and the update's traffic."""
        copies = self.gather_backward + self.gradients + self.latency
        return max(self.forward, self.gather_forward) + max(self.backward, copies, self.host) + self.weights

    @property
    def bound(self) -> str:
        """What takes most time: "compute", "gathers", "gradients", "messages" (latency), "weights" or "host"."""
        gathered = self.gather_forward + self.gather_backward
        parts = {
            "compute": self.compute,
            "gathers": gathered,
            "gradients": self.gradients,
            "messages": self.latency,
            "weights": self.weights,
            "host": self.host,
        }
        return max(parts, key=lambda name: parts[name])


def ring(sent: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of a collective in which a rank sends so many bytes round a ring."""
    if ranks <= cluster.node:
        return sent / cluster.inside
    return max(sent / cluster.inside, sent / (cluster.node * cluster.between))


def exchange(sent: float, ranks: int, cluster: Cluster) -> float:
    """Seconds in which a rank sends so many bytes to all others in equal parts, without what a message costs."""
    if ranks <= cluster.node:
        return sent / cluster.inside
    away = (ranks - cluster.node) / (ranks - 1)
    return max((1 - away) * sent / cluster.inside, away * sent / cluster.between)


def exchanges(setting: Setting) -> float:
    """Buckets of gradients in a step, mean over a sweep."""
    return fmean(len(scale_model.buckets(chunk, setting.element)) for chunk in setting.sweep)


def message_bytes(setting: Setting) -> float:
    """Bytes of one message to one rank in an exchange of gradients, on average."""
    return setting.element * setting.active / exchanges(setting) / setting.owners


def seconds(setting: Setting, cluster: Cluster) -> Seconds:
    """A step with activation checkpointing; products of attention itself and the update are left out."""
    shape, ranks, owners = setting.shape, setting.ranks, setting.owners
    product = 2.0 * setting.tokens * shape.block_numel / cluster.flops
    head = 2.0 * setting.tokens * shape.rest[-1].numel / cluster.flops
    # through the blocks that are reached: recompute and gradient of the input; of the weights for what is active
    weight_gradients = 2.0 * setting.tokens * setting.active / cluster.flops
    backward = 2 * fmean(setting.reached) * product + head + weight_gradients
    sent, whole = traffic(setting), gathers(setting)
    once = scale_model.others(setting.shards) * setting.element
    once *= sum(weight.padded(setting.shards) for weight in shape.stream)
    chunked = setting.method in CHUNKED
    pieces = fmean(len(chunk) for chunk in setting.sweep)
    latency = exchanges(setting) * (owners - 1) * cluster.message if chunked else 0.0
    if setting.method == "hybrid":  # an exchange inside of a copy, sums over copies
        to_owners = scale_model.others(owners) * setting.element * setting.active
        gradients = exchange(to_owners, owners, cluster) + (sent.gradients - to_owners) / (
            cluster.inside if ranks <= cluster.node else cluster.between
        )
    elif chunked:
        gradients = exchange(sent.gradients, ranks, cluster)
    else:
        gradients = ring(sent.gradients, ranks, cluster)
    return Seconds(
        forward=shape.layers * product + head,
        backward=backward,
        gather_forward=ring(once, setting.shards, cluster),
        gather_backward=ring(whole - once, setting.shards, cluster),
        gradients=gradients,
        latency=latency,
        weights=ring(sent.weights, ranks, cluster),
        host=pieces * owners * cluster.launch if setting.method in ("fsdp2", "hybrid") and ranks > 1 else 0.0,
    )


def finest(setting: Setting, rows: int = 1) -> int:
    """The most chunks that a model can be cut into where every piece of a rank has at least so many rows.

    Windows of the stream: rows of all shards together. Interleaved: those of the weight with the fewest, norms apart,
    which are never cut.
    """
    wide = [weight.rows // setting.owners for weight in setting.shape.block if weight.columns > 1]
    if setting.interleaved:
        return max(0, min(wide) // rows)
    tables = sum(weight.rows // setting.owners // rows for weight in setting.shape.rest if weight.columns > 1)
    return setting.shape.layers * sum(each // rows for each in wide) + tables


def fixed_batch(setting: Setting, tokens: int) -> Setting:
    """The setting with its share of so many tokens a step, at least one a rank."""
    return replace(setting, tokens=max(1, tokens // setting.ranks))
