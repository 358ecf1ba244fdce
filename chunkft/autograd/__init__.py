"""Autograd functions that compute weight gradients for slices; they know slices, not optimizers."""

from chunkft.autograd.embedding import sliced_embedding
from chunkft.autograd.linear import sliced_conv1d, sliced_linear
from chunkft.autograd.operators import SlicedForward, SlicedOperator, operator_for, register_operator
from chunkft.autograd.reentrant import ReentrantGuard
from chunkft.autograd.slices import Slice

__all__ = [
    "ReentrantGuard",
    "Slice",
    "SlicedForward",
    "SlicedOperator",
    "operator_for",
    "register_operator",
    "sliced_conv1d",
    "sliced_embedding",
    "sliced_linear",
]
