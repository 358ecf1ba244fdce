"""Both sides of a program: how they are built, and how they are compared."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor

import chunkft

from .nets import build
from .plans import make_plan
from .programs import Program
from .reference import Owners, Reference, saved_values

TOLERANCE = 1e-9
IN_MEMORY = {
    "residency": "chunk",
    "update": "step",
    "state_device": "host",
    "page_bytes": 1 << 20,
    "files": False,
}


class Difference(AssertionError):
    """chunkft and the reference do not agree."""


class Rig:
    """A model that chunkft trains and a reference of it.

    Args:
        plans: those that another run had, in order; with state in memory in place of the program's choice.
    """

    def __init__(self, program: Program, plans: list[chunkft.ChunkPlan] | None = None) -> None:
        self.program = program
        self.features = set(program["features"])
        self._given = None if plans is None else list(plans)
        self.plans: list[chunkft.ChunkPlan] = []
        self.trained: list[chunkft.ChunkPlan] = []  # with slices split by loading
        self.memories: list[dict[str, Any]] = []
        self.model = build(program["net"], program["seed"])
        self.dense = copy.deepcopy(self.model)
        self.trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.open = False  # whether there are gradients that no step used
        self.updated = False  # whether the reference used them already
        self.repeatable = True  # whether the same comes out with state in memory
        self.frozen: list[str] = []
        self.poison: float | None = None
        self.batches = 0
        self._directory = tempfile.TemporaryDirectory(prefix="fuzz")
        self.plan_spec = program["plan"]
        self.optimizer = self._build(program["memory"])
        base = program["base"]
        # ASGD computes its rates in another precision over lists of tensors
        left_out = ("fused",) if base["name"] == "ASGD" else ("fused", "foreach")
        plain = {k: v for k, v in base["options"].items() if k not in left_out}
        self.reference = Reference(
            self.dense,
            self._owners(),
            getattr(torch.optim, base["name"]),
            plain,
            [dict(hyper) for hyper in self._hyper()],
            {name: self._group(name) for name in self.trainable},
            self._schedule(),
            program["interval"],
            program["seed"],
            program["keep_state"],
            program["max_grad_norm"],
        )

    def _build(self, memory: dict[str, Any]) -> chunkft.ChunkOptimizer:
        program, base = self.program, self.program["base"]
        if program["max_grad_norm"] is not None or self.model.head is None:
            memory = {**memory, "update": "step"}  # refused otherwise
        self.memories.append(memory)
        if self._given is not None:
            memory, plan = IN_MEMORY, self._given.pop(0)
        else:
            plan = make_plan(self.model, self.plan_spec, program["seed"])
        if memory["files"] and memory["state_device"] in ("auto", "paged"):
            directory = tempfile.mkdtemp(dir=self._directory.name)
        else:
            directory = None
        model: Any = self.model
        hyper = self._hyper()
        options = dict(base["options"])
        if program["groups"] == "two":
            chunkft.attach(model)
            names = [name for name, _ in model.named_parameters() if name in self.trainable]
            model = [
                {"params": [self.model.get_parameter(n) for n in names if self._group(n) == i], **values}
                for i, values in enumerate(hyper)
            ]
            model = [group for group in model if group["params"]]
        optimizer = chunkft.ChunkOptimizer(
            model,
            getattr(torch.optim, base["name"]),
            chunks=None,
            partition=plan,
            schedule=self._schedule(),
            interval=program["interval"],
            keep_state=program["keep_state"],
            max_grad_norm=program["max_grad_norm"],
            state_device=memory["state_device"],
            residency=memory["residency"],
            update=memory["update"],
            page_bytes=memory["page_bytes"],
            state_dir=directory,
            seed=program["seed"],
            **hyper[0],
            **options,
        )
        self.plans.append(optimizer.plan)
        return optimizer

    def _hyper(self) -> list[dict[str, float]]:
        base = self.program["base"]
        first = {"lr": base["lr"], "weight_decay": base["weight_decay"]}
        groups = {self._group(name) for name in self.trainable}
        both = [first, {"lr": 2 * base["lr"], "weight_decay": 0.0}]
        return [both[i] for i in sorted(groups)]

    def _group(self, name: str) -> int:
        two = self.program["groups"] == "two" and {n.endswith("bias") for n in self.trainable} == {
            True,
            False,
        }
        return int(two and name.endswith("bias"))

    def _schedule(self) -> Any:
        schedule = self.program["schedule"]
        return schedule if isinstance(schedule, str) else lambda n, k: schedule[n % len(schedule)] % k

    def _owners(self) -> Owners:
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        return Owners(self.optimizer.plan, shapes)

    def _reaches(self, loss: Tensor) -> bool:
        wanted = [self.reference.parameters[name] for name in self.reference.names()]
        wanted = [p for p in wanted if p.requires_grad]
        if not wanted or not loss.requires_grad:
            return False
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in found)

    @property
    def _in_backward(self) -> bool:
        return self.memories[-1]["update"] == "backward"

    @property
    def _amid_updates(self) -> bool:
        """Whether some slices may be updated and others not."""
        return self._in_backward and self.open

    def _may_save(self) -> bool:
        memory = self.memories[-1]
        paged = memory["residency"] == "stream" or memory["state_device"] == "paged" or memory["files"]
        return not paged or memory["state_device"] in ("host", "device") or "paged_saves" in self.features

    def _same_weights(self) -> None:
        theirs = self.reference.parameters
        for name, parameter in self.model.named_parameters():
            close(parameter, theirs[name], name)

    def _same_state(self, when: str) -> None:
        ours = saved_values(self.optimizer.state_dict())
        for values in ours.values():
            if "step" in values:  # some bases make their state before the first step
                unborn = values["step"] == 0
                for value in values.values():
                    value[unborn] = float("nan")
        for name, values in self.reference.values.items():
            for key in sorted(values.keys() | ours.get(name, {}).keys()):
                empty = torch.full(self.reference.parameters[name].shape, float("nan"), dtype=torch.float64)
                close(ours.get(name, {}).get(key, empty), values.get(key, empty), f"{key} of {name} {when}")

    def _finish(self) -> None:
        self.optimizer.detach()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad != (name in self.trainable) and name not in self.frozen:
                raise Difference(f"after detach() {name} has requires_grad={parameter.requires_grad}")
            if "forward" in self.model.__dict__:
                raise Difference("after detach() the model has a forward of its own")


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raise Difference unless both are equal up to rounding in fp64; NaN equals NaN."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape:
        raise Difference(f"{what} has shape {tuple(ours.shape)}, should have {tuple(theirs.shape)}")
    same = (ours - theirs).abs() <= TOLERANCE * (1.0 + theirs.abs())
    same |= (ours == theirs) | (ours.isnan() & theirs.isnan())
    if not bool(same.all()):
        worst = torch.where(same, 0.0, (ours - theirs).abs())
        raise Difference(
            f"{what} differs in {int((~same).sum())} of {same.numel()} elements, by up to {float(worst.max()):.3g}"
        )
