"""Checks of what an optimizer is built from; nothing here changes a model, except to attach it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chunkft.attach import Attachment, attach, attachment_of
from chunkft.gathered import sharded_groups
from chunkft.plan import ParameterSpec, uncompiled

ModelOrGroups = nn.Module | Iterable[dict[str, Any]] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_choices(
    interval: Any,
    max_grad_norm: Any,
    keep_state: Any,
    seed: Any,
) -> None:
    """Raise ValueError that names the first of the shared arguments that is not allowed."""
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval={interval!r} is not allowed; needs an integer >= 1")
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm={max_grad_norm!r} is not allowed; needs a number > 0, or None")
    if not isinstance(keep_state, bool):
        raise ValueError(f"keep_state={keep_state!r} is not allowed; needs True or False")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not allowed; needs an integer")


def check_memory(
    residency: Any,
    update: Any,
    state_device: Any,
    page_bytes: Any,
    state_dir: Any,
    max_grad_norm: Any,
) -> None:
    """Raise ValueError that names the first argument about the place of state that is not allowed."""
    for name, value, allowed in (
        ("state_device", state_device, ("auto", "host", "paged", "device")),
        ("residency", residency, ("chunk", "stream")),
        ("update", update, ("step", "backward")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not known; allowed are {', '.join(map(repr, allowed))}")
    if isinstance(page_bytes, bool) or not isinstance(page_bytes, int) or page_bytes < 1:
        raise ValueError(f"page_bytes={page_bytes!r} is not allowed; needs an integer >= 1, in bytes")
    if state_dir is not None and (not isinstance(state_dir, str | os.PathLike) or not os.fspath(state_dir)):
        raise ValueError(f"state_dir={state_dir!r} is not allowed; needs the path of a directory, or None")
    for name, value in (("residency", residency == "stream"), ("state_dir", state_dir is not None)):
        if value and state_device not in ("auto", "paged"):
            given = state_dir if name == "state_dir" else residency
            raise ValueError(
                f"{name}={given!r} pages the state, which state_device={state_device!r} excludes; allowed are "
                "'auto' and 'paged'"
            )
    if update == "step":
        return
    if residency != "stream":
        raise ValueError(
            f"update='backward' needs residency='stream', got residency={residency!r}: a slice is updated while "
            "its state passes by"
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={max_grad_norm!r} cannot be combined with update='backward': the norm is known only "
            "when all gradients are there; use update='step', or None"
        )


def check_backward_step(grad_scale: Any) -> None:
    """Raise RuntimeError for what ``update="backward"`` cannot honour, since the update is done by now."""
    if grad_scale is not None:
        raise RuntimeError(
            "update='backward' cannot be used with a GradScaler: slices were updated with scaled gradients; use "
            "bfloat16 without a scaler, or update='step'"
        )


def check_hyperparameters(values: dict[str, Any], where: str = "") -> None:
    """Raise ValueError for a learning rate or a decay that no optimizer can use; torch's own let some pass.

    Args:
        values: keyword arguments of an optimizer, or a parameter group.
        where: put before the name, for messages.
    """
    for key in ("lr", "weight_decay", "eps"):
        value = values.get(key)
        if value is None or (key == "eps" and isinstance(value, tuple)):
            continue
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not _is_number(number) or not 0 <= number < math.inf:
            raise ValueError(f"{where}{key}={value!r} is not allowed; needs a finite number >= 0")
    betas = values.get("betas")
    if betas is None:
        return
    numbers = [b.item() if isinstance(b, Tensor) and b.numel() == 1 else b for b in _listed(betas)]
    if not numbers or not all(_is_number(b) and 0 <= b < 1 for b in numbers):
        raise ValueError(f"{where}betas={betas!r} is not allowed; needs numbers with 0 <= beta < 1")


def check_adamw(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Raise ValueError for an argument that is None or of the wrong length; AdamW has no default of its own for it."""
    for key, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if value is None:
            raise ValueError(f"{key}=None is not allowed; needs a finite number >= 0")
    if not isinstance(betas, Iterable) or len(_listed(betas)) != 2:
        raise ValueError(f"betas={betas!r} is not allowed; needs two numbers with 0 <= beta < 1")


def check_base(base: Any) -> None:
    """Raise unless ``base`` is an optimizer class that updates each parameter by itself."""
    if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)):
        raise TypeError(f"base must be a subclass of torch.optim.Optimizer, got {base!r}")
    if issubclass(base, torch.optim.LBFGS) or getattr(base, "chunked", False):
        raise ValueError(f"base={base.__name__} cannot be used: it does not update parameters one by one")
    if all(callable(getattr(base, name, None)) for name in ("train", "eval")):
        raise ValueError(
            f"base={base.__name__} cannot be used: its train() and eval() swap all weights between two sequences "
            "(schedule-free), and state of inactive slices is not there to swap them; use a base without them and a "
            "learning-rate schedule"
        )


def refuse_state_dict_tools() -> None:
    """Raise RuntimeError if ``get_optimizer_state_dict`` or ``set_optimizer_state_dict`` asks, also by a wrapper."""
    frame: Any = sys._getframe(2)
    for _ in range(2):
        if frame is not None and frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            raise RuntimeError(
                "torch.distributed.checkpoint.state_dict looks for whole parameters in the state of an optimizer, and "
                "chunkft has slices; use chunkft.save_checkpoint(optimizer, path), which all ranks call, with "
                "Accelerate chunkft.integrations.accelerate.save_state, with Trainer ChunkTrainer"
            )
        frame = frame and frame.f_back


def probe_base(
    base: type[torch.optim.Optimizer], groups: list[dict[str, Any]], base_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Build the base optimizer on parameters of one element, so that it can refuse what it does not take.

    Returns:
        Its defaults.

    Raises:
        ValueError, TypeError: as the base optimizer does; named after its class.
    """
    check_hyperparameters(base_kwargs)
    defaults: dict[str, Any] = {}
    for number, group in enumerate(groups):
        check_hyperparameters(group, f"parameter group {number}: ")
        kinds = dict.fromkeys((p.dim(), p.dtype, p.device) for p in group["params"])
        samples = [
            nn.Parameter(torch.zeros((1,) * dims, dtype=dtype, device=device))
            for dims, dtype, device in kinds
        ]
        if not samples:
            continue
        try:
            defaults = base([{**group, "params": samples}], **base_kwargs).defaults
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"base={base.__name__} does not take parameter group {number}: {error}"
            ) from error
    return defaults


def attachment_and_groups(model: ModelOrGroups) -> tuple[Attachment, list[dict[str, Any]], bool]:
    """The attachment, the parameter groups with full parameters, and whether we attached just now.

    Raises:
        TypeError: if ``model`` is neither a module nor parameter groups.
        ValueError: if the groups are not of one attached model, or the model has an optimizer already.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.Module):
        model = uncompiled(model)
        existing = model.__dict__.get("_chunkft")
        if existing is not None:
            _check_unused(existing)
        attachment = attach(model)
        parameters = [model.get_parameter(spec.name) for spec in attachment.specs]
        return attachment, [{"params": [p for p in parameters if p.requires_grad]}], existing is None
    entries = (
        list(model) if isinstance(model, Iterable) and not isinstance(model, Tensor | str | dict) else []
    )
    if not entries:
        raise TypeError(
            f"model must be a torch.nn.Module or a list of parameter groups, got {_described(model)}"
        )
    if isinstance(entries[0], Tensor) or _is_named(entries[0]):
        entries = [{"params": entries}]
    groups: list[dict[str, Any]] = []
    attachments: dict[int, Attachment] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "params" not in entry:
            raise TypeError(
                f"parameter group {number} must be a dict with 'params', got {type(entry).__name__}"
            )
        members = []
        for parameter in _without_names(_listed(entry["params"]), number):
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"parameter group {number} must hold tensors, got {type(parameter).__name__} {parameter!r}"
                )
            if not parameter.requires_grad:
                continue
            found = attachment_of(parameter)
            if found is None:
                raise ValueError(
                    f"parameter group {number} has a parameter of shape {tuple(parameter.shape)} whose model is "
                    "not known; call chunkft.attach(model) first, or pass the model itself"
                )
            attachments[id(found)] = found
            members.append(parameter)
        groups.append({**entry, "params": members})
    if len(attachments) != 1:
        raise ValueError(
            "parameter groups must be of one attached model and hold trainable parameters, got those of "
            f"{len(attachments)} models"
        )
    (attachment,) = attachments.values()
    return attachment, groups, False


def trained_specs(attachment: Attachment, groups: list[dict[str, Any]]) -> list[ParameterSpec]:
    """Specs of the parameters that are in some group, in stream order.

    Raises:
        ValueError: names a parameter whose values are not here, or are no floating-point numbers of 16 bits or more.
    """
    _check_trainable(attachment, groups)
    names = {attachment.name_of(parameter) for group in groups for parameter in group["params"]}
    return [spec for spec in attachment.specs if spec.name in names]


def _check_trainable(attachment: Attachment, groups: list[dict[str, Any]]) -> None:
    """Raise ValueError, with its name, for a parameter that is to be trained and has no floating-point values here."""
    shards = {
        id(param.sharded_param) for found in sharded_groups(attachment.model) for param in found.fsdp_params
    }
    for parameter in (parameter for group in groups for parameter in group["params"]):
        where = f"parameter {attachment.name_of(parameter)!r}"
        way_out = "freeze it with requires_grad_(False), and what is beside it can be trained"
        if parameter.is_meta:
            raise ValueError(
                f"{where} is on device 'meta': its values are offloaded, or were never loaded; load it onto a device, "
                "or " + way_out
            )
        dtype = parameter.dtype
        if is_traceable_wrapper_subclass(parameter) and id(parameter) not in shards:
            raise ValueError(
                f"{where} is a {type(parameter).__name__} of dtype {dtype}, made of other tensors (quantised "
                f"or distributed), and cannot be trained; {way_out}"
            )
        if dtype not in TRAINABLE:
            raise ValueError(
                f"{where} of dtype {dtype} cannot be trained; allowed are float64/32/16 and bfloat16; "
                + way_out
            )


def _check_unused(attachment: Attachment) -> None:
    if any(part.in_use for part in (attachment, *attachment.shares)):
        raise ValueError(
            "model is attached to another optimizer of chunkft already; detach() that one first, or "
            "chunkft.attach(model).detach() if it is gone"
        )


def _is_named(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _without_names(entries: list[Any], number: int) -> list[Any]:
    """The parameters of ``named_parameters()``; their names are known from the model.

    Raises:
        ValueError: if some have names and others have none, as for every ``torch.optim.Optimizer``.
    """
    named = [_is_named(entry) for entry in entries]
    if any(named) and not all(named):
        raise ValueError(
            f"parameter group {number} holds both (name, parameter) pairs and parameters alone; give all of them "
            "names, or none"
        )
    return [entry[1] for entry in entries] if any(named) else entries


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, Tensor) else [value]


def _described(value: Any) -> str:
    empty = isinstance(value, list | tuple) and not value
    return f"an empty {type(value).__name__}" if empty else type(value).__name__
