"""Where the weights live that an optimizer trains: the arguments about it, and what is built for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from chunkft.attach import Attachment
from chunkft.parallel import is_sharded
from chunkft.weights import DeviceLeaves, HostLeaves, WeightStream, stream_of, streams_in_part

WEIGHTS = ("auto", "resident", "stream")
UPDATES = ("auto", "host", "device")


@dataclass(frozen=True)
class WeightChoice:
    """The arguments of ``ChunkOptimizer`` that say where weights live and are updated."""

    weights: Any
    update_on: str
    device: torch.device | str
    resident_blocks: int
    weights_dir: str | os.PathLike[str] | None
    offload_inputs: bool = False


def check_weights(choice: WeightChoice, residency: str, update: str, state_device: str) -> None:
    """Raise ValueError that names the first argument about the place of weights that is not allowed."""
    if not isinstance(choice.weights, WeightStream) and choice.weights not in WEIGHTS:
        raise ValueError(
            f"weights={choice.weights!r} is not known; allowed are {', '.join(map(repr, WEIGHTS))} and a WeightStream"
        )
    if choice.update_on not in UPDATES:
        raise ValueError(
            f"update_on={choice.update_on!r} is not known; allowed are {', '.join(map(repr, UPDATES))}"
        )
    if choice.update_on == "host":
        for name, value, only in (
            ("residency", residency, "stream"),
            ("update", update, "backward"),
            ("state_device", state_device, "device"),
        ):
            if value == only:
                raise ValueError(
                    f"{name}={value!r} cannot be combined with update_on='host', where state is used in place in host "
                    "memory; use update_on='device'"
                )
    if choice.weights != "stream":
        given = (
            ("resident_blocks", choice.resident_blocks, 0),
            ("weights_dir", choice.weights_dir, None),
            ("offload_inputs", choice.offload_inputs, False),
            ("device", choice.device, "auto"),
        )
        for option, setting, default in given:
            if setting != default:
                raise ValueError(
                    f"{option}={setting!r} belongs to weights='stream'; a WeightStream takes it by itself"
                )


def build_weights(
    choice: WeightChoice, attachment: Attachment, residency: str, update: str, state_device: str, group: Any
) -> WeightStream | None:
    """Let the weights of the model stream if that was asked for, and tell the attachment where its leaves are.

    Returns:
        The stream, if one was made here and is to be detached with the optimizer.

    Raises:
        ValueError, RuntimeError, OSError: as for ``WeightStream``.
    """
    model = attachment.model
    present = stream_of(model)
    made: WeightStream | None = None
    if choice.weights == "stream" and is_sharded(model):
        raise ValueError(
            "weights='stream' cannot be combined with fully_shard, which gathers weights by itself; for shards in host "
            "memory give fully_shard a CPUOffloadPolicy"
        )
    if choice.weights == "stream":
        meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if meta is not None:
            raise ValueError(
                f"weights='stream': parameter {meta!r} is on the meta device and has no values; load the model by "
                "chunkft.load_streamed, or from_pretrained"
            )
        if present is None:
            present = made = WeightStream(
                model,
                device=choice.device,
                resident_blocks=choice.resident_blocks,
                weights_dir=choice.weights_dir,
                offload_inputs=choice.offload_inputs,
            )
        elif (
            choice.resident_blocks
            or choice.weights_dir is not None
            or choice.offload_inputs
            or choice.device != "auto"
        ):
            raise ValueError(
                "resident_blocks, weights_dir, offload_inputs and device: the weights of this model stream already, as "
                "they were told to when it was loaded; leave them out, or detach() that stream first"
            )
    elif isinstance(choice.weights, WeightStream) and choice.weights is not present:
        raise ValueError("weights: this WeightStream is of another model, or detached")
    if present is None:
        if streams_in_part(model):
            raise ValueError(
                f"model: weights of this {type(model).__name__} stream as those of a part of it, or of a module around "
                "it; build the optimizer for the module that the stream was made for"
            )
        if choice.update_on == "host":
            raise ValueError(
                "update_on='host' needs weights='stream': resident weights are updated where they are"
            )
        return None
    if choice.weights == "resident":
        raise ValueError("weights='resident': the weights of this model stream; detach() that stream first")
    try:
        if group is not None:
            raise ValueError(
                f"process_group={group!r} cannot be combined with weights that stream: gradients would have to be "
                "averaged in host memory; train in one process, or with weights='resident'"
            )
        on_device = choice.update_on == "device" or (
            choice.update_on == "auto"
            and (residency == "stream" or update == "backward" or state_device in ("paged", "device"))
        )
        if on_device:
            attachment.reside(DeviceLeaves(present, updated_in_backward=update == "backward"))
        else:
            attachment.reside(HostLeaves(present))
    except BaseException:
        if made is not None:
            made.detach()
        raise
    present.listen(attachment.wiring.moved)
    present.train(attachment.wiring.names)
    return made
