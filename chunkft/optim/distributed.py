"""Data parallelism: replicas that see different batches and must take the same step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # that of torch.compiler imports the compiler at once
from torch.nn.parallel import DistributedDataParallel

from chunkft.autograd.hooks import Hook
from chunkft.optim.agreement import agree
from chunkft.optim.outputs import tensors_in
from chunkft.parallel import is_sharded

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

_CANNOT_WRAP = (
    "DistributedDataParallel with {} cannot wrap a model that is trained in chunks, whose gradients chunkft averages "
    "itself; leave that out, or do not wrap and pass process_group="
)


def resolve_group(process_group: Any) -> dist.ProcessGroup | None:
    """The group that ``process_group=`` names, or None if none was asked for.

    Raises:
        ValueError: if it is neither a group of this process, nor ``"default"``, nor None.
    """
    if process_group is None:
        return None
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return process_group
    if isinstance(process_group, str) and process_group == "default":
        if dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        raise ValueError(
            "process_group='default' needs torch.distributed.init_process_group() before the optimizer is built"
        )
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group is a group that this process is not a member of; needs one of its own"
        )
    raise ValueError(
        f"process_group={process_group!r} is not allowed; needs a torch.distributed.ProcessGroup, 'default', or None"
    )


def check_alone(model: Any, group: dist.ProcessGroup | None, given: str) -> None:
    """Raise ValueError for what counts with one process, if there are more: ``given`` names it."""
    shared = group is not None and group.size() > 1
    if shared or (isinstance(model, nn.Module) and is_sharded(model)):
        what = "process_group=" if shared else "a model of fully_shard"
        raise ValueError(
            f"{given} counts the memory of one process with all weights and state, and cannot be combined with {what}; "
            "give chunks= (memory_report() tells what a rank holds)"
        )


def average_gradients(leaves: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average the gradients of the active leaves over a group.

    A leaf that got a gradient on some ranks only counts as zero on the others; one that got none anywhere stays
    without.
    """
    present = torch.tensor(
        [leaf.grad is not None for leaf in leaves], dtype=torch.int32, device=leaves[0].device
    )
    dist.all_reduce(present, op=dist.ReduceOp.MAX, group=group)
    for leaf, used in zip(leaves, present.tolist(), strict=True):
        if not used:
            continue
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        dist.all_reduce(leaf.grad, group=group)
        leaf.grad.div_(group.size())


class Replicas:
    """Which processes train replicas of a model, and when their gradients are averaged.

    A ``DistributedDataParallel`` shows itself in the first forward pass through it. Its reducer looked for parameters
    once, and the leaves change: from then on we average in its place, at the end of every backward pass that it would
    synchronise, so that what clips or logs gradients afterwards sees the average. Every replica holds all state then.
    Where a group was asked for, a ``Team`` divides state, and the wrapper is left with nothing to do.

    Args:
        optimizer: whose leaves are averaged.
        group: that was asked for, or None.
    """

    def __init__(self, optimizer: ChunkOptimizer, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.adopted = False
        self.closed = False
        self._optimizer = weakref.ref(optimizer)
        self._asked = group is not None
        self._wrapper: Callable[[], DistributedDataParallel | None] = lambda: None
        self._pending = True
        self._synced = False
        self._queued = False
        self._agreed: tuple[Any, Any] | None = None
        root = optimizer._attachment.model
        if isinstance(root, DistributedDataParallel):
            root = root.module
        for name, module in root.named_modules():
            if isinstance(module, DistributedDataParallel):
                raise ValueError(
                    f"model has a DistributedDataParallel at {name!r}, around a part of it; build the optimizer from "
                    "unwrapped modules, and wrap the whole model if at all"
                )
        self._root = weakref.ref(root)
        optimizer._attachment.hold(
            [root.register_forward_pre_hook(_Enter(self)), root.register_forward_hook(_Leave(self))]
        )

    def finish(self, leaves: Sequence[nn.Parameter]) -> None:
        """Average in ``step()`` what no backward pass averaged."""
        if self._pending or not self.adopted:
            self._average(leaves)
        self._pending = True

    def forget_agreement(self) -> None:
        """Compare the ranks again before the next average, because what they train may have changed."""
        self._agreed = None

    def close(self) -> None:
        """End averaging; a wrapper that we averaged for refuses to train from then on."""
        self.closed = True

    @_disable_dynamo
    def entered(self) -> None:
        """Note before a forward pass whether its backward pass is to end with an average."""
        wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None and wrapper is not self._wrapper():
            if all(module is not self._root() for module in wrapper.modules()):
                wrapper = None
            else:
                self._adopt(wrapper)
        if torch.is_grad_enabled():
            self._pending = True
            self._queued = False
            self._synced = wrapper is not None and bool(wrapper.require_backward_grad_sync)

    @_disable_dynamo
    def left(self, output: Any) -> None:
        """Watch for the backward pass of an output."""
        if not (self._synced and torch.is_grad_enabled()):
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._on_backward)  # type: ignore[no-untyped-call]

    def _adopt(self, wrapper: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self.closed:
            return
        for name, used in (
            ("static_graph=True", wrapper.static_graph),
            ("mixed_precision", wrapper.mixed_precision is not None),
            ("a communication hook", bool(wrapper._comm_hooks)),
            ("delay_all_reduce_named_params", wrapper._delay_all_reduce_all_params),
            ("the Python reducer of a compiler", wrapper._use_python_reducer),
            ("Join (uneven inputs)", wrapper._join_config.enable),
        ):
            if used:
                raise RuntimeError(_CANNOT_WRAP.format(name))
        if optimizer._team is not None:
            self._idle(wrapper)
            return
        group = self.group if self._asked else wrapper.process_group
        if optimizer.updates_in_backward and group is not None and group.size() > 1:
            raise ValueError(
                "update='backward' cannot be used in a DistributedDataParallel, which would average gradients after "
                "their update; do not wrap the model and pass process_group=, or use update='step'"
            )
        self._idle(wrapper)
        self.group = group
        self.adopted = True

    def _idle(self, wrapper: Any) -> None:
        """Let a wrapper average nothing by itself."""
        if not isinstance(wrapper.reducer, _Idle):
            wrapper.reducer._remove_autograd_hooks()
            # The logger holds the reducer, and the reducer buckets as large as the gradients it waits for.
            wrapper.reducer = wrapper.logger = _Idle()
        wrapper.reducer.replicas = self
        self._wrapper = weakref.ref(wrapper)

    def _on_backward(self, gradient: Tensor) -> None:
        if not self._queued and not self.closed:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    @torch.no_grad()
    def _after_backward(self) -> None:
        self._queued = False
        optimizer = self._optimizer()
        if optimizer is None or self.closed:
            return
        self._average([leaf for _, leaf in optimizer._attachment.active()])
        optimizer._attachment.wiring.show_gradients()
        self._pending = False

    def _average(self, leaves: Sequence[nn.Parameter]) -> None:
        if self.group is None or self.group.size() == 1 or not leaves:
            return
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._agreed is None or self._agreed[0] is not self.group or self._agreed[1] is not optimizer.plan:
            agree(optimizer, self.group, leaves[0].device)
            self._agreed = (self.group, optimizer.plan)
        average_gradients(leaves, self.group)


class _Enter(Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        replicas = self.target
        if replicas is not None and (
            replicas.adopted or DistributedDataParallel._active_ddp_module is not None
        ):
            replicas.entered()


class _Leave(Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.target is not None and self.target.adopted:
            self.target.left(output)


class _Idle:
    """In the place of a wrapper's reducer and logger: nothing is left for them to do while an optimizer averages."""

    replicas: Replicas | None = None

    def prepare_for_forward(self) -> None:
        """Nothing to prepare."""

    def set_runtime_stats_and_log(self) -> None:
        """Nothing to log."""

    def _rebuild_buckets(self) -> bool:
        return False

    def _remove_autograd_hooks(self) -> None:
        """They are gone already."""

    def _check_reducer_finalized(self) -> None:
        """No reduction is ever open."""

    def prepare_for_backward(self, outputs: Any) -> None:
        """Raise RuntimeError if nobody averages any more."""
        if self.replicas is None or self.replicas.closed or self.replicas._optimizer() is None:
            raise RuntimeError(
                "the optimizer that averaged gradients in place of this DistributedDataParallel was detached; wrap "
                "the module anew"
            )

    def _set_uneven_input_join(self) -> None:
        """Raise RuntimeError: Join, begun after the first step, asks for this."""
        raise RuntimeError(_CANNOT_WRAP.format("Join (uneven inputs)"))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"DistributedDataParallel asked its reducer for {name!r}, but gradients of a model that is trained in "
            "chunks are averaged by chunkft; do not wrap the model, and pass process_group= to the optimizer"
        )
