"""Pure functions on tensors: one operation a file, each with a reference in plain PyTorch.

Nothing here knows about modules, plans or optimizers; every function may be called on its own.
"""

from chunkft.kernels.adamw import adamw
from chunkft.kernels.embedding_grad import embedding_grad
from chunkft.kernels.grouped_wgrad import expert_wgrad, grouped_wgrad
from chunkft.kernels.linear_cross_entropy import linear_cross_entropy
from chunkft.kernels.precompile import precompile
from chunkft.kernels.rounding import apply_residual, split_residual, stochastic_round
from chunkft.kernels.selection import Blocks
from chunkft.kernels.wgrad import wgrad

__all__ = [
    "Blocks",
    "adamw",
    "apply_residual",
    "embedding_grad",
    "expert_wgrad",
    "grouped_wgrad",
    "linear_cross_entropy",
    "precompile",
    "split_residual",
    "stochastic_round",
    "wgrad",
]
