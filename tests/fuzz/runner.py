"""Runs a program by chunkft and by the reference, side by side."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

import chunkft

from .nets import loss_of
from .programs import Program
from .rig import Difference, Rig, close

READS = {
    "isnan().any()": lambda g: g.isnan().any().double(),
    "isfinite().all()": lambda g: g.isfinite().all().double(),
    "abs().max()": lambda g: g.abs().max(),
    "square sum": lambda g: (g**2).sum(),
    "clone().norm()": lambda g: g.clone().norm(),
    "detach().cpu().sum()": lambda g: g.detach().cpu().sum(),
}


def run(program: Program) -> dict[str, Tensor]:
    """Run a program, then once more with all state in memory, which must give the same bits.

    Returns:
        The weights at the end.

    Raises:
        Difference: if something differs from what it should be. What chunkft raises passes through.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = Run(program)
        weights = first.go()
        if first.repeatable and any(memory["state_device"] != "host" for memory in first.memories):
            twin = Run(program, plans=first.plans)
            same = twin.go()
            # Loading keeps the saved slices where there are no pages to cut them for: other slices, other rounding.
            if twin.trained == first.trained:
                for name, value in weights.items():
                    if not torch.equal(value, same[name]):
                        off = float((value - same[name]).abs().max())
                        raise Difference(f"{name} has other bits than with its state in memory, by {off:.3g}")
    return weights


class Run(Rig):
    """One program at work; what an operation does where it has no sense is nothing."""

    def go(self) -> dict[str, Tensor]:
        """Run all operations; the weights at the end."""
        try:
            for number, op in enumerate(self.program["ops"]):
                try:
                    getattr(self, f"_{op['op']}")(op)
                    if not self._amid_updates:
                        self._same_weights()
                except Exception as error:
                    error.add_note(f"at operation {number}: {op}")
                    raise
            self._step({})
            self._same_weights()
            if self._may_save():
                self._same_state("at the end")
            self._finish()
        finally:
            self.optimizer.detach()
            self._directory.cleanup()
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def _batch(self, op: dict[str, Any]) -> None:
        if self._in_backward and self.open:
            self._step(op)
        generator = torch.Generator().manual_seed(self.program["seed"] * 1000 + self.batches)
        self.batches += 1
        x = self.dense.batch(generator)
        state = generator.get_state()
        inputs = [x.clone(), x.clone()]
        if op["input"] and x.is_floating_point():
            for one in inputs:
                one.requires_grad_(True)
        scale = op["scale"]
        if self.poison is not None:
            scale, self.poison = self.poison, None
        dense_loss = loss_of(self.dense(inputs[0], op["skip"]), generator) * scale
        if not self._reaches(dense_loss) and "unreached" not in self.features:
            return
        if not dense_loss.requires_grad:
            return
        self.reference.backward(dense_loss)
        generator.set_state(state)
        loss = loss_of(self.model(inputs[1], op["skip"]), generator) * scale
        close(loss, dense_loss, "the loss")
        loss.backward()
        if inputs[0].grad is not None:
            if inputs[1].grad is None:
                raise Difference("the gradient of the input is missing")
            close(inputs[1].grad, inputs[0].grad, "the gradient of the input")
        self.open = True

    def _step(self, op: dict[str, Any]) -> None:
        if not self.open:
            return
        self.open = False
        self.trained.append(self.optimizer.plan)
        if not self.updated:
            self.reference.update()
        self.updated = False
        self.reference.close()
        self.optimizer.step()
        for name in ("active", "updates", "skipped"):
            ours, theirs = getattr(self.optimizer, name), getattr(self.reference, name)
            if ours != theirs:
                raise Difference(f"optimizer.{name} is {ours}, should be {theirs}")
        for ours, theirs in zip(self.optimizer.param_groups, self.reference.groups, strict=True):
            for key in ("lr", "weight_decay"):
                if ours[key] != theirs[key]:
                    raise Difference(f"{key} of a group is {ours[key]}, should be {theirs[key]}")
        if self.optimizer.interval_position != self.reference.position:
            raise Difference(
                f"interval_position is {self.optimizer.interval_position}, should be {self.reference.position}"
            )

    def _clip(self, op: dict[str, Any]) -> None:
        if not self.open or self._in_backward:
            return
        if all(
            p.grad is None for p in self.dense.parameters()
        ):  # torch 2.13 cannot clip the values of nothing
            if any(p.grad is not None for p in self.model.parameters()):
                raise Difference("there is a gradient, should be none")
            return
        if op["how"] == "value":
            clip_grad_value_(self.model.parameters(), op["limit"])
            clip_grad_value_(self.dense.parameters(), op["limit"])
        else:
            order = float(op["order"])
            ours = clip_grad_norm_(self.model.parameters(), op["limit"], order)
            close(ours, clip_grad_norm_(self.dense.parameters(), op["limit"], order), "the norm at clipping")

    def _norm(self, op: dict[str, Any]) -> None:
        if self._in_backward:
            return
        ours, theirs = (
            [p.grad for p in m.parameters() if p.grad is not None] for m in (self.model, self.dense)
        )
        if theirs:
            close(get_total_norm(ours), get_total_norm(theirs), "the norm of all gradients")

    def _drop(self, op: dict[str, Any]) -> None:
        if not self.open or self._in_backward:
            return
        (self.model if op["who"] == "model" else self.optimizer).zero_grad()
        self.dense.zero_grad()
        self.open = False

    def _lr(self, op: dict[str, Any]) -> None:
        if self._amid_updates:
            parameters = self.reference.parameters
            everywhere = all(parameters[name].grad is not None for name in self.reference.names())
            if self.updated or not everywhere or "late_lr" not in self.features:
                return
            self.reference.update()  # the new rate counts from the next step on
            self.updated, self.repeatable = True, False
        for ours, theirs, first in zip(
            self.optimizer.param_groups, self.reference.groups, self._hyper(), strict=True
        ):
            ours[op["key"]] = theirs[op["key"]] = first[op["key"]] * op["factor"]

    def _poison(self, op: dict[str, Any]) -> None:
        if self._in_backward:  # what was updated before it stands, which depends on the pages
            return
        if op["where"] == "loss":
            self.poison = float(op["value"])
            return
        for piece, leaf in self.optimizer.active_parameters():
            dense = self.reference.parameters[piece.name].grad
            if leaf.grad is not None and dense is not None:
                leaf.grad[(0,) * leaf.dim()] = float(op["value"])
                piece.of(dense)[(0,) * leaf.dim()] = float(op["value"])
                return

    def _eval(self, op: dict[str, Any]) -> None:
        if self._amid_updates:
            return
        x = self.dense.batch(torch.Generator().manual_seed(7))
        with torch.no_grad():
            close(self.model(x), self.dense(x), "the output")

    def _functional(self, op: dict[str, Any]) -> None:
        if self._amid_updates:
            return
        if len(list(self.dense.modules())) < len(list(self.dense.named_modules(remove_duplicate=False))):
            return  # functional_call of torch 2.13 does not put the parameters of a shared module back
        x = self.dense.batch(torch.Generator().manual_seed(8))
        with torch.no_grad():
            outputs = [
                torch.func.functional_call(m, {n: 0.9 * p for n, p in m.named_parameters()}, (x,))
                for m in (self.model, self.dense)
            ]
        close(*outputs, "the output with other parameters")

    def _freeze(self, op: dict[str, Any]) -> None:
        names = [name for name in self.reference.names() if name not in self.frozen]
        if self.open or not names:
            return
        name = names[op["which"] % len(names)]
        self.frozen.append(name)
        self._require(name, False)

    def _unfreeze(self, op: dict[str, Any]) -> None:
        if not self.open and self.frozen:
            self._require(self.frozen.pop(op["which"] % len(self.frozen)), True)

    def _require(self, name: str, flag: bool) -> None:
        for model in (self.model, self.dense):
            model.get_parameter(name).requires_grad_(flag)

    def _assign(self, op: dict[str, Any]) -> None:
        if self._amid_updates:
            return
        factor = op["factor"]
        if op["target"] == "module" and self.open:
            return  # the gradient comes to the new parameter with the next look only
        if op["target"] == "leaf":
            self.trained.append(self.optimizer.plan)  # which leaf that is depends on it
            pairs = list(self.optimizer.active_parameters())
            piece, leaf = pairs[op["which"] % len(pairs)]
            leaf.data = leaf.data * factor
            piece.of(self.reference.parameters[piece.name].data).mul_(factor)
            list(
                self.optimizer.active_parameters()
            )  # takes it into the weight, as the next forward pass would
            return
        names = sorted(self.trainable)
        for name in names if op["target"] == "all" else [names[op["which"] % len(names)]]:
            weight = self.model.get_parameter(name)
            self.reference.parameters[name].data.mul_(factor)
            if op["target"] != "module":
                weight.data = weight.data * factor
                continue
            other = torch.nn.Parameter(weight.detach() * factor, requires_grad=weight.requires_grad)
            for module in self.model.modules():
                for attribute, held in list(module._parameters.items()):
                    if held is weight:
                        setattr(module, attribute, other)

    def _read(self, op: dict[str, Any]) -> None:
        names = [name for name in self.reference.names() if self.reference.parameters[name].grad is not None]
        if not names or self._in_backward:
            return
        name = names[op["which"] % len(names)]
        ours, theirs = self.model.get_parameter(name).grad, self.reference.parameters[name].grad
        if ours is None:
            raise Difference(f"{name}.grad is None, should be a gradient")
        for what, read in READS.items():
            close(read(ours), read(theirs), f"{what} of {name}.grad")
        ours.float().mul_(3.0)
        ours.clone().zero_()

    def _load(self, op: dict[str, Any]) -> None:
        if self._amid_updates:
            return
        state = {key: value.clone() * op["factor"] for key, value in self.model.state_dict().items()}
        untied = len(state) == len(list(self.model.parameters()))
        self.dense.load_state_dict(state)
        self.model.load_state_dict(state, assign=op["assign"] and untied)

    def _resume(self, op: dict[str, Any]) -> None:
        # that a batch came which reached nothing is not saved
        if op["plan"] is not None or self._in_backward or not self.reference.has_gradients():
            self._step(op)
        if not self._may_save():
            return
        memory = self.memories[-1] if self.open else op["memory"]
        while self.frozen:
            if self.open:
                return
            self._require(self.frozen.pop(), True)
        self._same_state("before saving")
        old = self.optimizer
        if op["way"] == "file":
            path = Path(self._directory.name) / "optimizer.safetensors"
            chunkft.save_checkpoint(old, path)
        else:
            buffer = io.BytesIO()
            torch.save(old.state_dict(), buffer)
        if op["copy"]:
            self.model = copy.deepcopy(self.model)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.trainable)
        old.detach()
        if op["plan"] is not None:
            by = "user" if self.plan_spec["by"] == "user" else op["plan"]["by"]
            if self.plan_spec["slice_dim"] == 1 and (by == "layers") != (self.plan_spec["by"] == "layers"):
                by = self.plan_spec["by"]  # layers are whole rows: moments of columns cannot be cut so
            self.plan_spec = {**self.plan_spec, **op["plan"], "by": by}
        self.optimizer = self._build(memory)
        self.reference.changed_plan(self._owners())
        if op["way"] == "file":
            chunkft.load_checkpoint(self.optimizer, path)
        else:
            buffer.seek(0)
            self.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        if self._may_save():
            self._same_state("after loading")
