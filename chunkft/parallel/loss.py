"""The loss of a global batch whose parts have different numbers of tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def token_mean(
    loss_sum: Tensor, tokens: int | Tensor, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """A loss whose gradients, averaged over the ranks, are those of the mean over all tokens of all ranks.

    The mean of the ranks' means counts a token of a short sample more than one of a long sample. All ranks call this.

    Args:
        loss_sum: sum of the losses of this rank's tokens (``F.cross_entropy(..., reduction="sum")``), a scalar; of one
            micro-batch or of all of a step.
        tokens: how many tokens count in the step on this rank, over all of its micro-batches.
        process_group: the ranks; None is the default group, or this process alone if there is none.

    Returns:
        ``loss_sum * W / (tokens of all ranks)``, a scalar with the graph of ``loss_sum``. Its mean over the ranks is
        the loss of the global batch. 0 where no token counts anywhere. At least fp32: the factor is not rounded.

    Raises:
        ValueError: if ``tokens`` is a negative number; a tensor is not looked at, which would wait for it.
    """
    count = torch.as_tensor(tokens, dtype=torch.float64).detach().to(loss_sum.device)
    if not isinstance(tokens, Tensor) and tokens < 0:
        raise ValueError(f"tokens={tokens!r} is not allowed; needs a number >= 0")
    ranks = 1
    if process_group is not None or (dist.is_available() and dist.is_initialized()):
        count = count.clone()
        dist.all_reduce(count, group=process_group)
        ranks = dist.get_world_size(process_group)
    dtype = torch.promote_types(loss_sum.dtype, torch.float32)
    return loss_sum.to(dtype) * (ranks / count.clamp(min=1)).to(dtype)
