"""Autograd functions that compute weight gradients for slices; they know slices, not optimizers."""

from chunkft.autograd.embedding import sliced_embedding
from chunkft.autograd.gradient_view import Gradients, GradientView, joint_norm, total_norm
from chunkft.autograd.hooks import Hook, runs_as_it_is, undisturbed
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
from chunkft.autograd.reach import reached
from chunkft.autograd.reentrant import ReentrantGuard
from chunkft.autograd.slice_gradients import SliceGradients
from chunkft.autograd.slices import Slice
from chunkft.autograd.stand_ins import make_hollow, put_early_stand_in, put_stand_in, stand_in_of
from chunkft.autograd.tiled import TiledForward, Tiles, copied_forward, put_tiles, tiled_linear, tiles_of
from chunkft.autograd.trained import disown, hookable, own, record, records

__all__ = [
    "GradientView",
    "Gradients",
    "Hook",
    "Passes",
    "ReentrantGuard",
    "Slice",
    "SliceGradients",
    "SlicedForward",
    "SlicedOperator",
    "TiledForward",
    "Tiles",
    "compilable",
    "copied_forward",
    "disown",
    "hookable",
    "is_transformed",
    "joint_norm",
    "make_hollow",
    "operator_for",
    "own",
    "put_early_stand_in",
    "put_forward",
    "put_stand_in",
    "put_tiles",
    "reached",
    "record",
    "records",
    "register_operator",
    "runs_as_it_is",
    "sliced_conv1d",
    "sliced_embedding",
    "sliced_linear",
    "sliced_linear_cross_entropy",
    "stand_in_of",
    "strip_forward",
    "take_forward",
    "tiled_linear",
    "tiles_of",
    "total_norm",
    "uncompilable",
    "undisturbed",
]
