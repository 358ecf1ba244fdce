"""Parameters whose ``requires_grad`` tells whether they are trained, while autograd records the active ones only.

Loops read and set ``requires_grad`` to say what is to be trained: they list parameters once, freeze some in the middle
of a run, or set all of them for a moment. What autograd is to record changes with every chunk and is nobody's business
but ours. So a parameter of an attached model has two flags: that of the tensor, which autograd sees, and the one that
Python code sees, which is kept by the parameter's owner.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.utils.weak import WeakTensorKeyDictionary

# DistributedDataParallel waits for a gradient of each parameter that autograd records.
_MACHINERY = os.path.join("nn", "parallel", "distributed.py")
_NEW = nn.Parameter.__new__.__code__
_recorded: Any = torch._C.TensorBase.requires_grad
RECORDS = _recorded.__get__  # ``records`` for loops over all parameters, without a call in Python
_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter to a weak reference to its owner


class Owner(Protocol):
    """Who knows which of its parameters are trained."""

    @property
    def computes(self) -> bool:
        """Whether a forward pass runs: kernels then ask what autograd will need."""

    def is_trained(self, parameter: Tensor) -> bool:
        """Whether a parameter is trained when its turn comes."""

    def set_trained(self, parameter: Tensor, trained: bool) -> None:
        """Train a parameter from now on, or leave it as it is."""


class TrainedParameter(nn.Parameter):
    """A parameter of an attached model; its copies, pickled ones too, are ordinary parameters."""

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        return nn.Parameter(data, requires_grad)  # type: ignore[arg-type]

    @property
    def requires_grad(self) -> bool:
        owner = _owner(self)
        if owner is None or owner.computes or TracingContext.try_get() is not None:
            return records(self)
        recomputes = torch._C._current_graph_task_id() != -1  # a checkpoint in the backward pass
        if recomputes or sys._getframe(1).f_code.co_filename.endswith(_MACHINERY):
            return records(self)
        return owner.is_trained(self)

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        owner = _owner(self)
        if owner is None:
            record(self, trained)
        else:
            owner.set_trained(self, bool(trained))

    def detach(self) -> Tensor:
        # nn.Parameter(weight) wants something of the class of the weight from this, and makes that the parameter.
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _NEW:
            return torch.Tensor._make_subclass(TrainedParameter, super().detach())
        return super().detach()

    def requires_grad_(self, requires_grad: bool = True) -> TrainedParameter:
        self.requires_grad = requires_grad
        return self


def own(parameter: Tensor, owner: Owner) -> None:
    """Let ``owner`` answer for the ``requires_grad`` of a parameter that Python code sees.

    Parameters of a class of their own stay as they are: their flag is that of autograd.
    """
    if type(parameter) is nn.Parameter:
        parameter.__class__ = TrainedParameter
    if type(parameter) is TrainedParameter:
        _owners[parameter] = weakref.ref(owner)


def disown(parameter: Tensor) -> None:
    """Make an ordinary parameter of it again; what autograd sees stays."""
    if type(parameter) is TrainedParameter:
        _owners.pop(parameter, None)  # type: ignore[no-untyped-call]
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def records(parameter: Tensor) -> bool:
    """Whether autograd records what is computed with a parameter."""
    return bool(_recorded.__get__(parameter))


def record(parameter: Tensor, needed: bool) -> None:
    """Let autograd record what is computed with a parameter from now on, or not."""
    _recorded.__set__(parameter, needed)


@contextmanager
def hookable(parameter: Tensor) -> Iterator[None]:
    """Take hooks on the gradient also of a parameter that is frozen at the moment, which torch refuses."""
    kind, needed = type(parameter), records(parameter)
    if kind is TrainedParameter:
        parameter.__class__ = nn.Parameter
    record(parameter, True)
    try:
        yield
    finally:
        record(parameter, needed)
        parameter.__class__ = kind


def _owner(parameter: Tensor) -> Owner | None:
    reference = _owners.get(parameter)  # type: ignore[no-untyped-call]
    return None if reference is None else reference()
