"""Which tensors of a checkpoint make which weights of a transformers model, by transformers' own rules.

Most weights are a tensor of the file under its own or another name. Some architectures keep them in another form, as
the experts of a mixture, of which the file has one tensor each and the model one for all; transformers describes these
(``WeightConverter``). What is done here follows ``convert_and_load_state_dict_in_model`` and
``revert_weight_conversion`` of transformers, but for names and shapes alone: no tensor is read or made before it is
wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from chunkft.weights.reading import WeightFiles
from chunkft.weights.writing import Deferred

__all__ = ["Conversion", "LoadPlan", "original_format", "plan_load"]


@dataclass
class Conversion:
    """Weights of the model that are made of tensors of the file.

    Attributes:
        name: of the first weight.
        converter: transformers' rule.
        sources: (pattern of the rule, name in the file), in order.
        dtype: that the tensors are read in.
        targets: names of the weights.
    """

    name: str
    converter: WeightConverter
    dtype: torch.dtype
    sources: list[tuple[str, str]] = field(default_factory=list)
    targets: tuple[str, ...] = ()

    def convert(self, model: PreTrainedModel, tensor_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The weights, made of the tensors that ``tensor_of`` gives for the names in the file."""
        return _converted(self.converter, model, self.name, self.sources, tensor_of)


@dataclass
class LoadPlan:
    """How a checkpoint fills a model.

    Attributes:
        direct: name in the file of each weight or buffer that is one tensor of the file.
        conversions: the others.
        missing: names of the model that the file has nothing for.
        unexpected: names that the file has and the model does not.
        mismatched: (name, shape in the file, shape in the model).
    """

    direct: dict[str, str]
    conversions: list[Conversion]
    missing: set[str]
    unexpected: set[str]
    mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]]


def plan_load(model: PreTrainedModel, files: WeightFiles, rules: Iterable[Any]) -> LoadPlan:
    """How ``files`` fill a model whose parameters are on the meta device, in the dtypes that these have.

    Args:
        model: the model.
        files: the checkpoint.
        rules: transformers' rules for this model (``get_model_conversion_mapping``); those that match are marked as
            used.

    Raises:
        ValueError: if a rule cannot be applied to the shapes in the file; names the weight.
    """
    rules = list(rules)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    held = model.state_dict()
    plan = LoadPlan({}, [], set(held), set(), set())
    by_name: dict[str, Conversion] = {}
    for source in sorted(files.entries, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, held)
        if name not in held and source in held:
            name, pattern = rename_source_key(source, [], [], model.base_model_prefix, held)
        if name not in held:
            targets = by_pattern[pattern].target_patterns if pattern is not None else []
            plan.unexpected |= {name.replace(targets[0], target) for target in targets} or {name}
        elif pattern is None:
            plan.direct.setdefault(name, source)
        else:
            known = by_name.get(name)
            if known is None:
                known = Conversion(name, by_pattern[pattern], held[name].dtype)
                by_name[name] = known
            known.sources.append((pattern, source))
    for name, source in list(plan.direct.items()):
        _place(plan, name, files.entries[source].shape, held)
        if any(name == wrong for wrong, _, _ in plan.mismatched):
            del plan.direct[name]
    for conversion in by_name.values():
        _plan_conversion(plan, conversion, model, files, held)
    return plan


def _plan_conversion(
    plan: LoadPlan,
    conversion: Conversion,
    model: PreTrainedModel,
    files: WeightFiles,
    held: Mapping[str, Tensor],
) -> None:
    def shape_only(source: str) -> Tensor:
        return torch.empty(files.entries[source].shape, dtype=conversion.dtype, device="meta")

    try:
        made = conversion.convert(model, shape_only)
    except Exception as error:
        raise ValueError(
            f"weight {conversion.name!r} cannot be made of the {len(conversion.sources)} tensors of {files.path} that"
            f" transformers makes it of, which begin with {conversion.sources[0][1]!r} ({error}); load the model with"
            " from_pretrained, and give it to the optimizer with weights='stream'"
        ) from error
    kept = []
    for name, tensor in made.items():
        if name not in held:
            plan.unexpected.add(name)
            continue
        before = len(plan.mismatched)
        _place(plan, name, tuple(tensor.shape), held)
        if len(plan.mismatched) == before:
            kept.append(name)
    conversion.targets = tuple(kept)
    if kept:
        plan.conversions.append(conversion)


def _place(plan: LoadPlan, name: str, shape: tuple[int, ...], held: Mapping[str, Tensor]) -> None:
    plan.missing.discard(name)
    own = tuple(held[name].shape)
    if shape != own:
        plan.mismatched.add((name, shape, own))


def original_format(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor | Deferred]:
    """The weights under the names and in the form that checkpoints of this architecture have.

    What has to be converted is made when it is written, and let go of before the next is.
    """
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:  # not by from_pretrained; then nobody knows whether a prefix was removed
        rules = [
            rule
            for rule in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(rule, PrefixChange)
        ]
    reverse = [rule.reverse_transform() for rule in reversed(rules)]
    renamings = [rule for rule in reverse if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    result: dict[str, Tensor | Deferred] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(state, key=dot_natural_key):
        converted, pattern = _matched(name, converters)
        if pattern is None:
            result[_renamed(name, renamings)] = state[name]
        else:
            groups.setdefault(converted, []).append((pattern, name))
    for first, sources in groups.items():
        group = _Group(model, by_pattern[sources[0][0]], first, sources, state)
        for name, shown in group.shapes().items():
            final = _renamed(name, renamings)
            result[final] = Deferred(tuple(shown.shape), shown.dtype, partial(group.take, name))
    return result


def _matched(name: str, converters: Iterable[Any]) -> tuple[str, str | None]:
    """A name as the first rule that knows it has it, and which of its patterns that was."""
    for rule in converters:
        found, pattern = rule.rename_source_key(name)
        if pattern is not None:
            return found, pattern
    return name, None


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for rule in renamings:
        name, _ = rule.rename_source_key(name)
    return name


class _Group:
    """Tensors of a file that are made together, the first time that one of them is taken; each is taken once."""

    def __init__(
        self,
        model: PreTrainedModel,
        converter: WeightConverter,
        name: str,
        sources: list[tuple[str, str]],
        state: Mapping[str, Tensor],
    ) -> None:
        self._convert = partial(_converted, converter, model, name, sources)
        self._state = state
        self._made: dict[str, Tensor] = {}

    def shapes(self) -> dict[str, Tensor]:
        return self._convert(lambda name: self._state[name].detach().to("meta"))

    def take(self, name: str) -> Tensor:
        if name not in self._made:
            self._made = self._convert(lambda source: self._state[source].detach())
        return self._made.pop(name)


def _converted(
    rule: WeightConverter,
    model: PreTrainedModel,
    name: str,
    sources: list[tuple[str, str]],
    tensor_of: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    converter = copy.deepcopy(rule)
    for pattern, source in sources:
        # transformers calls what it is given, when it wants the tensor
        converter.add_tensor(name, source, pattern, partial(tensor_of, source))
    made = converter.convert(name, model=model, config=model.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}
