"""Where the parameters of a model were at the last look, and whether somebody put others in their places since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chunkft.autograd.trained import RECORDS, record
from chunkft.bound import Bound
from chunkft.plan import ParameterSpec, parameter_owners

Owners = Mapping[str, Sequence[tuple[nn.Module, str]]]  # by name who uses a parameter, and as what


class Places:
    """The parameters of an attachment by name, as they were when it was made and as they are.

    Args:
        model: the module.
        specs: of the parameters.
    """

    def __init__(self, model: nn.Module, specs: Sequence[ParameterSpec]) -> None:
        self.model = model
        self._expected = {spec.name: (spec.shape, model.get_parameter(spec.name).dtype) for spec in specs}
        self._offloaded = {spec.name for spec in specs if model.get_parameter(spec.name).is_meta}
        self._places: list[tuple[str, dict[str, Any], str, nn.Parameter, tuple[int, ...], torch.dtype]] = []
        self._links: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._wrapped = {spec.name for spec in specs if _is_made_of_others(model.get_parameter(spec.name))}
        owners = parameter_owners(model)
        holders = {name: holders_of([model.get_parameter(name)], owners[name]) for name in self._expected}
        self._ties = [  # who held a parameter at first that several held
            (parameters, attribute, name)
            for name, held in holders.items()
            for parameters, attribute in (held if len(held) > 1 else ())
        ]

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return list(self._expected)

    def forget(self) -> None:
        """The next look is a whole one."""
        self._places, self._links = [], []

    def current(self, name: str) -> nn.Parameter:
        """The parameter of this name now.

        Raises:
            RuntimeError: if it is gone, or changed its shape, dtype or, to "meta", its device, or is made of others.
        """
        shape, dtype = self._expected[name]
        parameter = self.held(name)
        if parameter is None:
            raise RuntimeError(f"parameter {name!r} is no longer in the model; build a new optimizer")
        if tuple(parameter.shape) != shape:
            raise RuntimeError(
                f"parameter {name!r} had shape {shape} when the optimizer was built and has "
                f"{tuple(parameter.shape)} now; detach() the optimizer, then build a new one"
            )
        if parameter.is_meta and name not in self._offloaded:
            raise RuntimeError(
                f"parameter {name!r} is on device 'meta' now: its values were offloaded after the optimizer was built. "
                "Use a device_map without offloading for what is trained"
            )
        if name not in self._wrapped and _is_made_of_others(parameter):
            raise RuntimeError(
                f"parameter {name!r} is a {type(parameter).__name__} now, made of other tensors: the model was sharded "
                "or quantised after the optimizer was built, which cannot be followed; detach() the optimizer"
            )
        if parameter.dtype != dtype:
            raise RuntimeError(
                f"parameter {name!r} was {dtype} when the optimizer was built and is "
                f"{parameter.dtype} now; convert the model first, then build the optimizer"
            )
        return parameter

    def held(self, name: str) -> nn.Parameter | None:
        """What the model has under this name, whatever it is."""
        *path, attribute = name.split(".")
        module: nn.Module | None = self.model
        for part in path:  # get_parameter() takes ten times as long
            module = None if module is None else _entries(module._modules).get(part)
        held: dict[str, nn.Parameter] = {} if module is None else _entries(module._parameters)
        return held.get(attribute)

    def stands_for(self, name: str, held: Any, parameter: nn.Parameter | None) -> bool:
        """Whether another object in a module is this parameter (None: whichever is ``current``) all the same."""
        return False

    def record(self, name: str, needed: bool) -> None:
        """Let autograd record what is computed with the parameter of this name, or not."""
        record(self.current(name), needed)

    def note(self) -> None:
        """Remember where every parameter is, so that the next look finds out by identity alone."""
        links: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        for name, (shape, dtype) in self._expected.items():
            *path, attribute = name.split(".")
            module = self.model
            for part in path:
                children = _entries(module._modules)
                child = children[part]
                assert child is not None
                links[id(module), part] = (children, part, child)
                module = child
            held = _entries(module._parameters)
            self._places.append((name, held, attribute, self.current(name), shape, dtype))
        self._links = list(links.values())

    @property
    def are_tied(self) -> bool:
        """Whether all that was shared at first is so."""
        return self._untied() is None

    def check_ties(self) -> None:
        """Raise RuntimeError, naming the parameter, if one is not shared any more that was so at first."""
        untied = self._untied()
        if untied is not None:
            name, attribute = untied
            raise RuntimeError(
                f"parameter {name!r} was shared with a parameter {attribute!r} of another module when the "
                "optimizer was built and is not any more, as after load_state_dict(assign=True); tie them again "
                "(model.tie_weights() in transformers), or detach() the optimizer and build a new one"
            )

    def _untied(self) -> tuple[str, str] | None:
        ties = (
            (name, attribute)
            for held, attribute, name in self._ties
            if held.get(attribute) is not self.current(name)
            and not self.stands_for(name, held.get(attribute), None)
        )
        return next(ties, None)

    def are_as_noted(self, bound: Mapping[str, Bound]) -> bool:
        """Whether nothing that has to be followed happened since ``note``; it runs in every step."""
        if not self.hold_the_same(bound):
            return False
        for parameters, attribute, name in self._ties:
            if name not in bound:
                continue
            held = parameters.get(attribute)
            if held is not bound[name].parameter and not self.stands_for(name, held, None):
                return False
        with DisableTorchFunctionSubclass():  # which every look at a parameter of a class of its own asks for
            for *_, seen, shape, dtype in self._places:
                if seen.shape != shape or seen.dtype is not dtype:
                    return False
            for one in bound.values():
                if not one.is_in_place():
                    return False
        return True

    def hold_the_same(self, bound: Mapping[str, Bound]) -> bool:
        """Whether the modules hold the parameters that they held at ``note``, none of which autograd records but the
        bound ones; it runs in every forward pass.
        """
        if not self._places:
            return False
        for children, part, child in self._links:
            if children.get(part) is not child:
                return False
        records = RECORDS
        with DisableTorchFunctionSubclass():
            for name, parameters, attribute, seen, _, _ in self._places:
                if records(seen) and name not in bound:
                    return False
                held = parameters.get(attribute)
                if held is not seen and not self.stands_for(name, held, seen):
                    return False
        return True


def holders_of(
    parameters: Sequence[Tensor], owners: Sequence[tuple[nn.Module, str]]
) -> list[tuple[dict[str, Any], str]]:
    """Where one of these is held, of the modules that use it (an attention computes with its projection's weight)."""
    places = [(_entries(module._parameters), attribute) for module, attribute in owners]
    wanted = {id(parameter) for parameter in parameters}
    return [(held, attribute) for held, attribute in places if id(held.get(attribute)) in wanted]


def _entries(held: Any) -> dict[str, Any]:
    """What a module holds by name; of scripted modules, whose parts stay what they are, as it is now."""
    return held if isinstance(held, dict) else dict(held.items())


def _is_made_of_others(parameter: Tensor) -> bool:
    return is_traceable_wrapper_subclass(parameter)
