"""transformers' models whose weights go from the files straight to where they will live, and from there into files."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo, log_state_dict_report

from chunkft.integrations.conversions import LoadPlan, original_format, plan_load
from chunkft.plan import uncompiled
from chunkft.weights import WeightStream
from chunkft.weights.reading import WeightFiles, check, open_weights, weights_of
from chunkft.weights.writing import SHARD_BYTES, Deferred, write_weights

__all__ = ["TASKS", "load_streamed", "save_streamed"]

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "base": "AutoModel",
}
# They put weights elsewhere, or change them while they are loaded.
_OTHER_PLACES = (
    *("device_map", "max_memory", "offload_folder", "tp_plan", "distributed_config", "quantization_config"),
    *("gguf_file", "state_dict", "adapter_kwargs", "use_safetensors"),
)
Place = Callable[[nn.Module], object]
_patching = threading.RLock()


def load_streamed(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "auto",
    task: str | type = "causal-lm",
    place: Place | None = None,
    **options: Any,
) -> Any:
    """Load a model so that its weights go from the files straight into the host pages that they stream from.

    As ``from_pretrained`` does, with the same weights, buffers, generation config and report, in evaluation mode; but
    the model is never in memory twice, and never on the device as a whole. What transformers converts (experts of a
    mixture) is in memory twice for one weight at a time.

    Args:
        directory: a model directory with safetensors files, or the name of a model on the hub.
        dtype: of the weights; by default what the config says.
        device: where the model computes, for the default of ``place``; ``"auto"`` is the first GPU, or the CPU.
        task: a key of ``TASKS``, or a model class of transformers (``AutoModel...`` too).
        place: gives every parameter of the model, which is on the meta device, memory to be filled; by default it is
            ``chunkft.weights.WeightStream(model, device=device)``. For more of its options:
            ``place=functools.partial(WeightStream, device="cuda", resident_blocks=4)``.
        options: passed to ``from_pretrained``: ``attn_implementation=``, ``num_labels=``, ``config=``, ...

    Returns:
        The model. Parameters that the files lack are initialised as transformers does, and named in its report.

    Raises:
        FileNotFoundError: if the weights, or files that their index names, are not there.
        ValueError: for an unknown ``task``; an option that puts weights elsewhere; files that are torn, of another
            model, quantised, or not safetensors. All of that before ``place`` is called.
    """
    for name in _OTHER_PLACES:
        if options.get(name) is not None:
            raise ValueError(
                f"{name}={options[name]!r} cannot be used with load_streamed, which places the weights"
            )
    kind = _class_of(task)
    if os.path.isfile(directory):
        raise ValueError(f"directory={os.fspath(directory)!r} is a file; expected a model directory")
    if os.path.isdir(directory) and not options.get("variant"):
        # headers only: says what is wrong before a model is built
        open_weights(Path(directory, options.get("subfolder") or ""))
    if dtype is not None:
        options["dtype"] = dtype
    if place is None:
        place = partial(WeightStream, device=device)
    elif device != "auto":
        raise ValueError(
            f"device={device!r} is for the default of place, and place={place!r} was given; tell it that"
        )
    with _loading_by(_Loader(place)):
        return kind.from_pretrained(os.fspath(directory), use_safetensors=True, **options)


def save_streamed(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Save a model straight from where its weights live, as ``save_pretrained`` would.

    Config, generation config, tokenizer and weights are written beside ``directory`` and take its place together:
    killed at any moment, it holds the old model or the new one. ``from_pretrained`` and ``load_streamed`` load it.

    Args:
        model: a transformers model, compiled or not; its weights must not change meanwhile.
        directory: of the model; a tokenizer or texts that lie there stay.
        tokenizer: saved too if given; anything with ``save_pretrained``.
        max_shard_bytes: most bytes of weights in a file.

    Raises:
        TypeError: if it is no transformers model, is quantised, or has adapters.
        ValueError, OSError: see ``chunkft.weights.writing.write_weights``.
    """
    model = uncompiled(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; save_streamed needs a transformers model")
    for mark, what in (("hf_quantizer", "is quantised"), ("_hf_peft_config_loaded", "has adapters")):
        if getattr(model, mark, None):
            raise TypeError(f"model {what}; save_streamed writes plain weights, use save_pretrained")

    def others(stage: Path) -> None:
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        if model.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, stage, config=model.config)
        model.config.save_pretrained(stage)
        if model.can_generate():
            model.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)

    write_weights(directory, _saved(model), max_shard_bytes=max_shard_bytes, extra=others)


def _saved(model: PreTrainedModel) -> dict[str, Tensor | Deferred]:
    """What a checkpoint of the model holds; of weights that are tied, one."""
    state: dict[str, Tensor] = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    by_memory: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        where = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel():
            by_memory.setdefault(where, []).append(name)
    for names in by_memory.values():
        again = [name for name in names if name in tied]
        for name in again[: len(names) - 1]:
            del state[name]
    return original_format(model, state)


def _class_of(task: str | type) -> Any:
    if not isinstance(task, str):
        if not hasattr(task, "from_pretrained"):
            raise ValueError(f"task={task!r} has no from_pretrained; expected a model class of transformers")
        return task
    if task not in TASKS:
        raise ValueError(f"task={task!r}: allowed are {', '.join(map(repr, TASKS))}, or a model class")
    return getattr(transformers, TASKS[task])


class _Loader:
    """Does what from_pretrained leaves to `_load_pretrained_model` and `_finalize_model_loading`."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def load(self, model: PreTrainedModel, checkpoint: list[str] | None, config: Any) -> LoadStateDictInfo:
        """Fill a model that from_pretrained has built on the meta device."""
        files = self._check(model, checkpoint, config)
        rules = list(config.weight_mapping or ())
        plan = plan_load(model, files, rules)
        _apply_dtypes(model, plan, config.dtype_plan or {})
        model._weight_conversions = [rule for rule in rules if rule.was_used()]
        if plan.mismatched and not config.ignore_mismatched_sizes:
            name, saved, own = sorted(plan.mismatched)[0]
            raise ValueError(
                f"{files.path} has {len(plan.mismatched)} weights of other shapes than the model: {name!r} has {saved},"
                f" the model {own}; with ignore_mismatched_sizes=True they are initialised anew"
            )
        new = plan.missing | {name for name, _, _ in plan.mismatched}
        _tie(model, plan, files, new)
        info = LoadStateDictInfo(
            missing_keys=set(plan.missing),
            unexpected_keys=set(plan.unexpected),
            mismatched_keys=set(plan.mismatched),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        model._adjust_missing_and_unexpected_keys(info)
        _make_buffers(model)
        wanted = {
            source: model.get_parameter_or_buffer(name).dtype for name, source in plan.direct.items()
        } | {source: conversion.dtype for conversion in plan.conversions for _, source in conversion.sources}
        check(files, {name: _stand_in(files.entries[name].shape, dtype) for name, dtype in wanted.items()})
        log_state_dict_report(model, config.pretrained_model_name_or_path, True, info, _logger())
        self._place(model)
        _fill(model, plan, files)
        if new:
            _initialise(model, new)
        return info

    def _check(self, model: PreTrainedModel, checkpoint: list[str] | None, config: Any) -> WeightFiles:
        name = type(model).__name__
        if config.hf_quantizer is not None:
            raise ValueError(f"the weights of this {name} are quantised; load_streamed needs plain ones")
        where = Path(config.pretrained_model_name_or_path)
        if checkpoint is None or not all(file.endswith(".safetensors") for file in checkpoint):
            raise ValueError(f"{where} has no safetensors files; save the model with save_pretrained first")
        placed = [weight for weight, parameter in model.named_parameters() if not parameter.is_meta]
        if placed:
            raise ValueError(f"{name} was not built on the meta device: {placed[0]!r} has memory already")
        return weights_of(where, map(Path, checkpoint))


@contextlib.contextmanager
def _loading_by(loader: _Loader) -> Iterator[None]:
    """Within the block from_pretrained of this thread has `loader` fill the models that it builds."""
    with _patching:
        load, finish = PreTrainedModel._load_pretrained_model, PreTrainedModel._finalize_model_loading
        thread = threading.get_ident()
        loaded: list[PreTrainedModel] = []

        def ours(model: Any, state: Any, checkpoint: Any, config: Any, *rest: Any, **named: Any) -> Any:
            if threading.get_ident() != thread or loaded or state is not None:
                return load(model, state, checkpoint, config, *rest, **named)
            loaded.append(model)
            return loader.load(model, checkpoint, config), None

        def finished(model: Any, config: Any, info: Any) -> Any:
            return info if any(model is one for one in loaded) else finish(model, config, info)

        PreTrainedModel._load_pretrained_model = staticmethod(ours)
        PreTrainedModel._finalize_model_loading = staticmethod(finished)
        try:
            yield
            if not loaded:
                raise RuntimeError(
                    "the model class loads its weights by itself; load_streamed cannot place them"
                )
        finally:
            PreTrainedModel._load_pretrained_model = staticmethod(load)
            PreTrainedModel._finalize_model_loading = staticmethod(finish)


def _apply_dtypes(model: PreTrainedModel, plan: LoadPlan, wanted: dict[str, torch.dtype]) -> None:
    """Weights that a model wants in a dtype of their own (`_keep_in_fp32_modules`) get it, if they are in the files."""

    def own(name: str) -> torch.dtype | None:
        found = (dtype for glob, dtype in wanted.items() if re.search(glob.replace("*", ".*"), name))
        return next(found, None)

    kinds = {name: own(name) for name in plan.direct}
    for conversion in plan.conversions:
        conversion.dtype = own(conversion.name) or conversion.dtype
        kinds |= dict.fromkeys(conversion.targets, own(conversion.name))
    for name, dtype in kinds.items():
        if dtype is None:
            continue
        path, _, attribute = name.rpartition(".")
        held = model.get_parameter_or_buffer(name)
        module = model.get_submodule(path)
        if isinstance(held, nn.Parameter):
            setattr(module, attribute, nn.Parameter(held.to(dtype), held.requires_grad))
        else:
            module._buffers[attribute] = held.to(dtype)


def _tie(model: PreTrainedModel, plan: LoadPlan, files: WeightFiles, new: set[str]) -> None:
    """Ties what the config says before anything has memory, so that tied weights get it once."""
    absent = set(new)
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in plan.direct or source not in plan.direct:
            continue
        if files.equal(plan.direct[target], plan.direct[source]):
            del plan.direct[target]
            absent.add(target)
        else:
            _logger().warning(
                f"{files.path} has different values for {target} and {source}, which the config ties: they are not tied"
            )
            del model.all_tied_weights_keys[target]
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    plan.missing &= absent
    new &= absent


def _make_buffers(model: PreTrainedModel) -> None:
    """Gives buffers memory and the values that the model's code gives them."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    _initialise(model, {name for name, _ in model.named_buffers()})


def _initialise(model: PreTrainedModel, names: set[str]) -> None:
    """Initialises these weights, and all buffers that are never in files, as the model's code does."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        tensor._is_hf_initialized = name not in names
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    for tensor in state.values():
        tensor._is_hf_initialized = True


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to be checked in place of one that has no memory yet."""
    return torch.empty((), dtype=dtype).expand(shape)


def _fill(model: PreTrainedModel, plan: LoadPlan, files: WeightFiles) -> None:
    held = model.state_dict()
    files.read_into({source: held[name] for name, source in plan.direct.items()})
    for conversion in plan.conversions:
        made = conversion.convert(model, partial(files.read, dtype=conversion.dtype))
        for name in conversion.targets:
            held[name].copy_(made.pop(name))


def _logger() -> Any:
    return transformers.utils.logging.get_logger("transformers.modeling_utils")
