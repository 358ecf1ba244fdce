"""Parameters that ``fully_shard`` exchanges in their modules: the shard, and the whole while a module computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from chunkft.autograd import SliceGradients, record, records
from chunkft.bound import Bound
from chunkft.places import Places
from chunkft.plan import ParameterSpec


def forms_of(param: Any) -> tuple[Tensor, ...]:
    """What modules may hold of an ``FSDPParam``: its shard, the whole, and its shard of a smaller mesh if any."""
    forms = param.sharded_param, param._unsharded_param, getattr(param, "_sharded_post_forward_param", None)
    return tuple(form for form in forms if form is not None)


class _Unshown(SliceGradients):
    """Gradients that ``weight.grad`` never stands for: FSDP2 would reduce it."""

    def show(self) -> None:
        """Nothing is shown."""


class GatheredBound(Bound):
    """A sharded weight with active slices: ``parameter`` is the whole that autograd sees, whose memory comes and goes.

    Its leaves have no memory; what can move is the shard, at ``address``.
    """

    param: Any
    shard: Tensor  # as it was when its flag was set

    @classmethod
    def of(cls, param: Any, cut_anyway: bool) -> GatheredBound:
        """That of an ``FSDPParam``."""
        bound = cls(param._unsharded_param, param._sharded_param_data.data_ptr(), [], cut_anyway=cut_anyway)
        bound.param = param
        bound.shard = param.sharded_param
        return bound

    def __post_init__(self) -> None:
        self.gradients = _Unshown(self)

    def forms(self) -> Sequence[Tensor]:
        """The parameters that modules may hold as this weight."""
        return forms_of(self.param)

    def is_in_place(self) -> bool:
        """Whether the shard is where it was, and trained or not as its leaves are."""
        if self.param._sharded_param_data.data_ptr() != self.address:
            return False
        return not self.pairs or self.asked() in (None, records(self.pairs[0][1]))

    def asked(self) -> bool | None:
        """The flag of the shard, which is no class of ours; that of another in its place says nothing."""
        return records(self.shard) if self.shard is self.param.sharded_param else None

    def is_held(self) -> bool:
        """Whether modules hold a form of this weight."""
        forms = {id(form) for form in self.forms()}
        return all(id(parameters.get(attribute)) in forms for parameters, attribute in self.holders)

    def gather(self) -> None:
        """Leaves have no values that could be taken."""

    def follow(self) -> bool:
        """Take note of where the shard is now, and let autograd record what came into its place."""
        self.address = self.param._sharded_param_data.data_ptr()
        self.shard = self.param.sharded_param
        self.record(self.pairs[0][1].requires_grad)
        return True


class GatheredPlaces(Places):
    """The parameters of a model by name: their shards, whichever form modules hold at the moment.

    Args:
        model: the module.
        specs: of the parameters.
        params: the ``FSDPParam`` of each by name.
    """

    def __init__(self, model: nn.Module, specs: Sequence[ParameterSpec], params: Mapping[str, Any]) -> None:
        self._params = params
        super().__init__(model, specs)

    def held(self, name: str) -> nn.Parameter | None:
        """The shard, if the model has any form of it under this name, else what it has."""
        held = super().held(name)
        shard: nn.Parameter = self._params[name].sharded_param
        return shard if self.stands_for(name, held, None) else held

    def current(self, name: str) -> nn.Parameter:
        """The shard of this name now.

        Raises:
            RuntimeError: as that of ``Places``, and if the module holds a parameter that ``fully_shard`` does not know.
        """
        shard: nn.Parameter = self._params[name].sharded_param
        if super().current(name) is not shard:
            raise RuntimeError(
                f"parameter {name!r} is not the one that fully_shard sharded any more; detach() the optimizer, then "
                "build a new one"
            )
        return shard

    def stands_for(self, name: str, held: Any, parameter: nn.Parameter | None) -> bool:
        """Whether a module holds another form of this parameter."""
        param = self._params[name]
        known = parameter is None or parameter is param.sharded_param
        return known and any(held is form for form in forms_of(param))

    def record(self, name: str, needed: bool) -> None:
        """Let autograd record what is computed with any form of the parameter, or not."""
        for form in forms_of(self._params[name]):
            record(form, needed)
