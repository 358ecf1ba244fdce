"""Autograd functions that compute weight gradients for slices; they know slices, not optimizers."""

from chunkft.autograd.embedding import sliced_embedding
from chunkft.autograd.gradient_view import Gradients, GradientView, joint_norm, total_norm
from chunkft.autograd.linear import sliced_conv1d, sliced_linear
from chunkft.autograd.linear_cross_entropy import sliced_linear_cross_entropy
from chunkft.autograd.operators import (
    SlicedForward,
    SlicedOperator,
    compilable,
    operator_for,
    put_forward,
    register_operator,
    strip_forward,
    take_forward,
    uncompilable,
)
from chunkft.autograd.passes import Passes, is_transformed
from chunkft.autograd.reentrant import ReentrantGuard
from chunkft.autograd.slice_gradients import SliceGradients
from chunkft.autograd.slices import Slice
from chunkft.autograd.trained import disown, own, record, records

__all__ = [
    "GradientView",
    "Gradients",
    "Passes",
    "ReentrantGuard",
    "Slice",
    "SliceGradients",
    "SlicedForward",
    "SlicedOperator",
    "compilable",
    "disown",
    "is_transformed",
    "joint_norm",
    "operator_for",
    "own",
    "put_forward",
    "record",
    "records",
    "register_operator",
    "sliced_conv1d",
    "sliced_embedding",
    "sliced_linear",
    "sliced_linear_cross_entropy",
    "strip_forward",
    "take_forward",
    "total_norm",
    "uncompilable",
]
