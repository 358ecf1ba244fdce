"""Random programs: a model, a plan, a place for state, an optimizer, and what a loop does with them, as plain JSON."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Program = dict[str, Any]

# What the fuzzer is able to do beside the ordinary; `--without` leaves some out.
FEATURES = (
    "inplace",  # activations in place behind a sliced layer
    "freezing",  # requires_grad_() in the middle of a run
    "unreached",  # batches that reach no active slice
    "functional",  # functional_call with other parameters under no_grad
    "assigning",  # p.data = ... on weights and on leaves, other parameters in the place of weights
    "fused",  # fused=True
    "paged_saves",  # saves of paged or streamed state
    "reading",  # weight.grad is read like a tensor
    "late_lr",  # learning rates set between backward() and step()
)

ELEMENTWISE: dict[str, list[dict[str, Any]]] = {
    "AdamW": [{}, {"amsgrad": True}, {"betas": [0.8, 0.9], "eps": 1e-6}, {"maximize": True}],
    "Adam": [{}, {"amsgrad": True}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}],
    "RMSprop": [{"eps": 1e-6}, {"eps": 1e-6, "momentum": 0.5}, {"eps": 1e-4, "centered": True, "alpha": 0.9}],
    "Adagrad": [{"eps": 1e-6}, {"eps": 1e-6, "initial_accumulator_value": 0.1, "lr_decay": 0.01}],
    "NAdam": [{}, {"decoupled_weight_decay": True}],
    "RAdam": [{}, {"decoupled_weight_decay": True}],
    "Adamax": [{"eps": 1e-6}],
    "Adadelta": [{}],
    "ASGD": [{"t0": 3.0}],
}
FUSED = ("AdamW", "Adam", "SGD", "Adagrad")
PLAIN = {"head.bias": "*bias", "head": "head*", "norms": "layers.0.*"}


class Chooser(Protocol):
    """Where a choice comes from: a seed, or hypothesis, which can make failing programs smaller."""

    def choice(self, options: Sequence[T]) -> T: ...


class Seeded:
    """Choices of a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choice(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


def program(choose: Chooser, without: Sequence[str] = ()) -> Program:
    """A random program. Features named in ``without`` are kept out of it."""
    one = choose.choice
    features = [feature for feature in FEATURES if feature not in without]
    memory = _memory(one)
    return {
        "seed": one(range(1000)),
        "net": _net(one, features),
        "plan": _plan(one),
        "memory": memory,
        "base": _base(one, features),
        "groups": one(["one", "one", "two"]),
        "schedule": one(["cyclic", "reverse", "random", [0, 0, 1, 2], [1]]),
        "interval": one([1, 1, 2, 3]),
        "keep_state": one([True, True, True, False]),
        "max_grad_norm": one([None, None, 0.1, 3.0]) if memory["update"] == "step" else None,
        "ops": [_op(one, features) for _ in range(one(range(4, 26)))],
        "features": features,
    }


def _net(one: Any, features: list[str]) -> dict[str, Any]:
    thens = ["none", "none", "gelu", "tanh"]
    if "inplace" in features:
        thens += ["relu_", "mul_", "add_"]
    return {
        "tokens": one([True, False]),
        "dims": one([2, 3]),
        "width": one([3, 6, 9]),
        "head": one(["own", "tied", "functional"]),
        "padding": one([None, None, 0]),
        "by_frequency": one([False, False, True]),
        "twice": one([False, False, True]),
        "frozen": one([[], [], [], [0], [1], [1, 4], [2, 3]]),
        "layers": [
            {
                "kind": one(["linear", "linear", "conv1d", "norm", "again", "tied"]),
                "out": one([3, 6, 9, 70]),
                "bias": one([True, False]),
                "then": one(thens),
                "optional": one([False, False, True]),
                "residual": one([False, True]),
                "recomputed": one([False, False, False, True]),
            }
            for _ in range(one(range(5)))
        ],
    }


def _plan(one: Any) -> dict[str, Any]:
    return {
        "chunks": one([1, 2, 3, 3, 4, 6, 9]),
        "by": one(["bytes", "bytes", "layers", "interleaved", "user"]),
        "slice_dim": one([0, 0, 1]),
        "always": one([None, None, *PLAIN.values()]),
        "atomic": one([None, None, "layers.0.*", "table.weight"]),
        "row_multiple": one([1, 2, 64]),
    }


def _memory(one: Any) -> dict[str, Any]:
    residency = one(["chunk", "chunk", "stream"])
    return {
        "residency": residency,
        "update": one(["step", "backward"]) if residency == "stream" else "step",
        "state_device": one(["auto", "paged"] + (["host", "device"] if residency == "chunk" else [])),
        "page_bytes": one([1, 200, 1024, 1 << 20]),
        "files": one([False, False, True]),
    }


def _base(one: Any, features: list[str]) -> dict[str, Any]:
    name = one(["AdamW", "AdamW", *ELEMENTWISE])
    options = dict(one(ELEMENTWISE[name]))
    implementation = one([None, None, "foreach", "single", "fused"])
    if implementation == "fused" and "fused" in features and name in FUSED:
        options["fused"] = True
    elif implementation in ("foreach", "single"):
        options["foreach"] = implementation == "foreach"
    return {
        "name": name,
        "options": options,
        "lr": one([1e-3, 1e-2]),
        "weight_decay": one([0.0, 0.1]),
    }


def _op(one: Any, features: list[str]) -> dict[str, Any]:
    """One thing that a loop does; the runner leaves out what has no sense where it stands."""
    kinds = (
        ["batch"] * 8 + ["step"] * 8 + ["clip", "clip", "drop", "lr", "resume", "resume", "resume", "poison"]
    )
    kinds += ["eval", "norm", "load"]
    for feature, more in (
        ("freezing", ["freeze", "freeze", "unfreeze"]),
        ("functional", ["functional"]),
        ("assigning", ["assign", "assign"]),
        ("reading", ["read"]),
    ):
        kinds += more if feature in features else []
    kind = one(kinds)
    op: dict[str, Any] = {"op": kind}
    if kind == "batch":
        op |= {
            "skip": one([False, False, True]),
            "scale": one([1.0, 1.0, 0.5, 30.0]),
            "input": one([False, True]),
        }
    elif kind == "clip":
        op |= {
            "how": one(["norm", "value"]),
            "limit": one([0.01, 0.3, 100.0]),
            "order": one([2.0, 1.0, "inf"]),
        }
    elif kind == "drop":
        op |= {"who": one(["model", "optimizer"])}
    elif kind == "lr":
        op |= {"key": one(["lr", "lr", "weight_decay"]), "factor": one([0.0, 0.5, 3.0])}
    elif kind == "resume":
        op |= {"way": one(["dict", "file"]), "copy": one([False, False, True]), "memory": _memory(one)}
        op |= {
            "plan": one(
                [None, {"chunks": one([1, 2, 3, 5, 8]), "by": one(["bytes", "layers", "interleaved"])}]
            )
        }
    elif kind == "poison":
        op |= {"value": one(["nan", "inf"]), "where": one(["loss", "leaf"])}
    elif kind in ("freeze", "unfreeze", "read"):
        op |= {"which": one(range(12))}
    elif kind == "assign":
        op |= {
            "which": one(range(12)),
            "target": one(["weight", "leaf", "all", "module"]),
            "factor": one([1.0, 1.01]),
        }
    elif kind == "load":
        op |= {"assign": one([False, True]), "factor": one([1.0, 0.99])}
    return op
