"""An optimizer that trains one chunk of the parameters at a time."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft import tracing
from chunkft.activations import saved_activations
from chunkft.attach import Attachment
from chunkft.autograd import Slice
from chunkft.optim.accounting import MemoryMeter
from chunkft.optim.arguments import (
    ModelOrGroups,
    attachment_and_groups,
    check_base,
    check_choices,
    check_memory,
    probe_base,
    refuse_state_dict_tools,
    trained_specs,
)
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.distributed import Replicas, check_alone, resolve_group
from chunkft.optim.forecast import weight_nbytes
from chunkft.optim.master import resolve_master
from chunkft.optim.memory import DEFAULT_PAGE_BYTES, MemoryChoice, build_memory
from chunkft.optim.paged import PagedStore
from chunkft.optim.paging import PagingMeter, PagingReport
from chunkft.optim.parts import full_state
from chunkft.optim.planner.budget import DEFAULT_CHUNKS, choose
from chunkft.optim.report import MemoryReport
from chunkft.optim.restore import read_state, restore_together
from chunkft.optim.rule import Groups, UpdateRule
from chunkft.optim.serialize import optimizer_state
from chunkft.optim.sharded_state import sharded_state
from chunkft.optim.state import State
from chunkft.optim.stepping import take
from chunkft.optim.switch import (
    Switch,
    activate,
    at_work,
    bind,
    settle,
)
from chunkft.optim.team import Team, build_team
from chunkft.optim.weights import WeightChoice, build_weights, check_weights
from chunkft.parallel import KINDS
from chunkft.partitions import Partition, make_plan
from chunkft.plan import ChunkPlan
from chunkft.schedule import Schedule, active_chunk, check_schedule
from chunkft.weights import WeightStream


class ChunkOptimizer(torch.optim.Optimizer):
    """Any ``torch.optim`` optimizer, applied to one chunk of the model at a time (ChunkFT, arXiv 2605.21177).

    The trainable parameters are cut into ``chunks`` chunks; one is active for ``interval`` optimizer steps, then
    the next. Gradients exist for the active slices only, and so does optimizer state on the parameters' device.
    ``step()`` consumes the gradients: afterwards every ``.grad`` is None.

    Args:
        model: a module, or a list of parameter groups (or parameters, with or without names) of a module on which
            ``chunkft.attach`` was called. Groups keep their hyper-parameters for life; only their ``params`` change at
            a switch.
        base: class of the optimizer that updates the active slices.
        chunks: K; see ``chunkft.partition``, also for ``partition``, ``slice_dim`` and ``always_active``.
        memory_budget: instead of ``chunks``, the memory of the device that training may take, such as ``"8GiB"``:
            ``chunkft.plan_memory`` chooses ``chunks``, and ``residency`` if it is not ``"stream"`` already, so that a
            causal language model fits. With ``weights="stream"``, or where nothing else fits and ``weights="auto"``,
            also ``update_on`` and ``resident_blocks``. Everything else as it is given here. Not for parameter groups.
        memory_tokens: tokens of a forward pass that ``memory_budget`` has to hold.
        interval: T, optimizer steps (not micro-batches) before the next chunk becomes active.
        partition: how to cut; ``"bytes"``, ``"layers"``, ``"interleaved"``, a plan, or one's own.
        schedule: ``"cyclic"``, ``"reverse"``, ``"random"`` or a callable; see ``chunkft.schedule.active_chunk``.
        slice_dim: 0 cuts rows, 1 columns.
        always_active: patterns of parameters that train at every step, or ``"head"``.
        keep_state: False forgets the optimizer state of a chunk when it becomes inactive (BAdam).
        max_grad_norm: clip the norm over all active slices to this, or None.
        master: how 16-bit weights keep small updates; see ``chunkft.optim.master.resolve_master``.
        state_device: where the state of inactive chunks lives. ``"host"``: in host memory, used in place by
            parameters on the CPU and copied by others; ``"paged"``: in page-locked host memory, paged ahead by
            the streaming core; ``"device"``: where the parameters are; ``"auto"``: ``"paged"`` if any parameter
            is on a GPU, or if ``residency`` or ``state_dir`` ask for it, else ``"host"``.
        residency: ``"chunk"``: the state of the active chunk stays on the device for the interval; ``"stream"``: it
            passes through three pages of ``page_bytes`` inside every step, so that K does not bound its memory.
        update: ``"step"``: parameters are updated in ``step()``; ``"backward"``, with ``residency="stream"``: inside
            of the backward pass, as soon as the gradients of a page are complete, which are freed at once. One
            backward pass a step: no accumulation, no ``max_grad_norm``, no GradScaler, no ``DistributedDataParallel``.
        page_bytes: size of a page of ``residency="stream"``; slices are cut so that their state fits.
        weights: ``"resident"``: on the device, as they are; ``"stream"``: in host memory, from where each block comes
            to the device when it computes (``chunkft.WeightStream``, which may be given as well); ``"auto"``: as they
            are, in a model whose weights stream already.
        update_on: where weights that stream are updated. ``"host"``: in host memory, to which gradients come down, with
            state in place; ``"device"``: in a copy of the active slices beside the ring, with state as for resident
            weights; ``"auto"``: on the device if ``residency="stream"``, ``update="backward"`` or a ``state_device``
            there ask for it, else on the host.
        resident_blocks: how many blocks of weights that stream stay on the device.
        weights_dir: a directory for a file that holds weights that stream, in place of host memory.
        offload_inputs: recompute the blocks of weights that stream in the backward pass, from inputs that wait in host
            memory, in place of the model's own activation checkpointing.
        device: where weights stream to; ``"auto"`` is the first GPU, or the CPU where there is none.
        state_dir: a directory whose files hold the state in place of host memory; made if it does not exist. Of ranks
            that share chunks each has a directory in it.
        process_group: the processes that train replicas: a ``torch.distributed.ProcessGroup``, or ``"default"``. Each
            owns a part of the active slices, whose gradients it gets, whose state it holds and which it updates. None:
            this process trains by itself, unless the model is wrapped in ``DistributedDataParallel``, whose replicas
            get averaged gradients and hold all state each, or sharded by ``fully_shard``, whose shards are updated
            where they are.
        seed: of the random schedule and of stochastic rounding.
        **base_kwargs: passed to ``base``.

    Attributes:
        plan: the ``ChunkPlan``.
        active: index of the active chunk.
        sweep: number of complete passes over the chunks.
        interval_position: optimizer steps done in this interval.
        updates: optimizer steps applied so far; ``skipped``: those left out for non-finite gradients.
        grad_norm: norm over the active slices at the last step that clipped, or None.

    Raises:
        TypeError: if ``model`` or ``base`` is of the wrong kind.
        ValueError: if an argument is not allowed. The model is left as it was.
    """

    chunked = True
    # A GradScaler then calls step() even if it found infinities, so that such gradients are consumed too. Left in
    # the leaves, where model.zero_grad() does not reach them, they would spoil every step that follows.
    _step_supports_amp_scaling = True
    _state_bits = 32

    def __init__(
        self,
        model: ModelOrGroups,
        base: type[torch.optim.Optimizer],
        *,
        chunks: int | None = DEFAULT_CHUNKS,
        memory_budget: int | str | None = None,
        memory_tokens: int = 1024,
        interval: int = 50,
        partition: Partition = "bytes",
        schedule: Schedule = "cyclic",
        slice_dim: int = 0,
        always_active: str | Sequence[str] | None = None,
        keep_state: bool = True,
        max_grad_norm: float | None = None,
        master: str = "auto",
        state_device: str = "auto",
        residency: str = "chunk",
        update: str = "step",
        page_bytes: int = DEFAULT_PAGE_BYTES,
        weights: str | WeightStream = "auto",
        update_on: str = "auto",
        resident_blocks: int = 0,
        weights_dir: str | os.PathLike[str] | None = None,
        offload_inputs: bool = False,
        device: torch.device | str = "auto",
        state_dir: str | os.PathLike[str] | None = None,
        process_group: Any = None,
        seed: int = 0,
        **base_kwargs: Any,
    ) -> None:
        check_base(base)
        check_choices(interval, max_grad_norm, keep_state, seed)
        check_memory(residency, update, state_device, page_bytes, state_dir, max_grad_norm)
        check_schedule(schedule)
        where = WeightChoice(weights, update_on, device, resident_blocks, weights_dir, offload_inputs)
        group = resolve_group(process_group)
        if memory_budget is not None:
            check_alone(model, group, f"memory_budget={memory_budget!r}")
            chunks, residency, where = choose(
                model, base, base_kwargs, memory_budget, memory_tokens,
                chunks=chunks, residency=residency, update=update, partition=partition, slice_dim=slice_dim,
                always_active=always_active, state_device=state_device, state_dir=state_dir, master=master,
                interval=interval, page_bytes=page_bytes, state_bits=self._state_bits, where=where,
            )  # fmt: skip
        check_weights(where, residency, update, state_device)
        attachment, groups, owned = attachment_and_groups(model)
        self._ready = False
        self._team: Team | None = None  # the ranks that share the chunk with this one
        self._stream: WeightStream | None = None  # that is this optimizer's own
        try:
            self._specs = specs = trained_specs(attachment, groups)
            self._attachment = attachment = attachment.share({spec.name for spec in specs})
            self._lock = (
                attachment.lock
            )  # of step() and of the switch, which a call of the model may have to finish
            self._work: FrameType | None = None  # where step() or a switch is done
        except BaseException:
            if owned:
                attachment.detach()
            raise
        try:
            defaults = probe_base(base, groups, base_kwargs)
            self._team = team = build_team(attachment, group)
            if team is None:
                plan = make_plan(attachment.model, specs, chunks, partition, slice_dim, always_active)
            else:
                plan = team.divide(specs, chunks, partition, slice_dim, always_active)
            self._modes = {
                spec.name: resolve_master(master, attachment.model.get_parameter(spec.name).dtype)
                for spec in specs
            }
            self._base_class = base
            self._base_kwargs = base_kwargs
            self._keep_state = keep_state
            self._schedule = schedule
            self._seed = seed
            self._group_of = {
                str(attachment.name_of(p)): i for i, group in enumerate(groups) for p in group["params"]
            }
            self.interval = interval
            self.max_grad_norm = max_grad_norm
            self.updates = 0
            self.skipped = 0
            self.grad_norm: Tensor | None = None
            self._interval_index = 0
            self._generation = 0
            self._warned_unreached = False
            self._switch: Switch | None = None  # while one is under way
            self._switch_hook: RemovableHandle | None = None
            self.interval_position = 0
            super().__init__(groups, defaults)
            rule = self._rule()
            self._stream = build_weights(where, attachment, residency, update, state_device, group)
            residence = attachment.wiring.residence
            on_host = residence is not None and not residence.on_device
            rule = replace(rule, host_kernel=rule.state_bits == 8 or (on_host and _beside_gpu(attachment)))
            ranks = (1, 0) if team is None else team.numbers()
            memory = MemoryChoice(residency, update, state_device, page_bytes, state_dir, on_host, *ranks)
            own = plan if team is None else team.own(plan)
            own, self._store, self._residency = build_memory(memory, own, rule, attachment, plan)
            self._meter = PagingMeter()
            self._memory = MemoryMeter()
            # Loaded state may split slices; the next load starts from here again.
            self._given_plan = self._own_plan = own
            self.plan: ChunkPlan = own if team is None else plan
            self._ready = True
            attachment.freeze()
            in_backward = isinstance(self._residency, BackwardResidency)
            attachment.wiring.shows_gradients = not in_backward and team is None
            if team is not None:
                team.join(self)
            activate(self)
            if team is not None:
                team.rounds.watch()
            attachment.on_replaced = weakref.WeakMethod(self._bind_replaced)
            self._replicas = Replicas(self, group)
        except BaseException:
            self._release(keep_attached=not owned)
            raise

    @property
    def active(self) -> int:
        """Index of the active chunk."""
        return active_chunk(self._schedule, self._interval_index, len(self.plan), self._seed)

    @property
    def sweep(self) -> int:
        """Number of complete passes over the chunks."""
        return self._interval_index // len(self.plan)

    @property
    def is_divided(self) -> bool:
        """Whether this process holds a part of the state, and others the rest."""
        return self._team is not None

    @property
    def updates_in_backward(self) -> bool:
        """Whether slices are updated inside of the backward pass (``update="backward"``)."""
        return isinstance(self._residency, BackwardResidency)

    @property
    def state(self) -> Any:
        """State of the active slices, by leaf.

        Raises:
            RuntimeError: to ``torch.distributed.checkpoint.state_dict``, which would take a step with zero gradients to
                find out what there is, and looks for whole parameters in it.
        """
        refuse_state_dict_tools()
        return self._shown_state

    @state.setter
    def state(self, value: Any) -> None:
        self._shown_state = value

    def active_parameters(self) -> Iterator[tuple[Slice, nn.Parameter]]:
        """Pairs of each active slice and the leaf that holds its weights and its gradient.

        Of many processes each has those that it owns.
        """
        if self._ready and self._is_attached():
            settle(self)
            self._follow_weights()
        return iter(self._attachment.active() if self._team is None else self._team.pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active slices from their gradients, then consume the gradients.

        Non-finite gradients are dropped without any update. After ``interval`` updates the next chunk becomes
        active.

        Args:
            closure: recomputes the loss, as for every ``torch.optim.Optimizer``.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock, tracing.span("step"):
            self._check_attached("step")
            self._check_idle("step")
            settle(self)
            try:
                self._work = sys._getframe()
                self._follow_weights()
                take(self)
            finally:
                self._work = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the active slices; with ``update="backward"`` also begin the step anew."""
        if self._ready and self._is_attached():
            settle(self)
            attachment = self._attachment
            if attachment.wiring.generation != self._generation or not attachment.wiring.holds_active():
                self._follow_weights()  # what replaced a weight may have a gradient already
        super().zero_grad(set_to_none)
        if self._team is not None and self._ready:
            self._team.rounds.drop()
        if set_to_none:
            self._attachment.wiring.hide_gradients()
        if isinstance(self._residency, BackwardResidency) and self._residency.begun:
            self._residency.reset()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer as tensors and plain values; loads with ``weights_only=True``.

        Returns:
            A dict with ``state`` (for each parameter its full-shape state tensors, and the step count and other
            values of each range of rows), ``param_groups``, ``cursor``, ``plan`` and, inside of an accumulation
            window, ``gradients``. Of many processes that share the state each has its part: tensors of the slices
            that it owns, which this rank of so many loads again, and ``chunkft.merge_states`` joins.

        Raises:
            RuntimeError: with a process group between ``backward`` and ``step``.
        """
        self._check_attached("state_dict")
        self._check_idle("state_dict")
        with self._lock:  # other threads may save
            settle(self)
            self._check_between_steps("state_dict")
            for before in self._optimizer_state_dict_pre_hooks.values():
                before(self)
            result = optimizer_state(self)
            for after in self._optimizer_state_dict_post_hooks.values():
                replaced = after(self, result)
                result = result if replaced is None else replaced
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict``; also from one with other chunks, whose moments are cut anew.

        With the same plan the run goes on bit-exactly; with another one it goes on at the start of the sweep. Of
        many processes that share the state all call this, with their own part or with the same whole state.

        Raises:
            ValueError: if it is not a state of chunkft, or of another model, or the part of another rank; nothing is
                changed then, on any rank.
        """
        self._check_attached("load_state_dict")
        self._check_idle("load_state_dict")
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()  # hooks may put their own entries into it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        with self._lock:
            restore_together(self, lambda: (read_state(self, state_dict), repr(state_dict["cursor"])))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def full_state_dict(self, everywhere: bool = False) -> dict[str, Any] | None:
        """The ``state_dict`` of the whole state, of many processes that share it; all of them call this.

        Args:
            everywhere: whether each gets it; else rank 0 does.

        Returns:
            What one process with all of the state would give; None on other ranks. Hooks of ``state_dict`` do not run.

        Raises:
            RuntimeError: on all ranks, between ``backward`` and ``step``.
        """
        self._check_idle("full_state_dict")
        with self._lock:
            return full_state(self, everywhere)

    def sharded_state_dict(self) -> dict[str, Any]:
        """What this process has of the state as a flat dict for ``torch.distributed.checkpoint``; all ranks call this.

        Keys are different on all ranks but for that of the header, which is the same bytes everywhere.
        ``chunkft.ShardedState`` wraps it for ``dcp.save`` and ``dcp.load``. Tensors are those of the optimizer, not
        copies: they are to be written before the next step.

        Raises:
            RuntimeError: on all ranks, between ``backward`` and ``step``.
        """
        self._check_idle("sharded_state_dict")
        with self._lock:
            return sharded_state(self).entries()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible after construction: the plan is fixed. Raises RuntimeError."""
        if getattr(self, "_ready", False):
            raise RuntimeError(
                "parameters cannot be added: the plan is fixed; detach() and build a new optimizer"
            )
        super().add_param_group(param_group)

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind.

        Returns:
            ``weights``: of the whole model, if they stream what of it is on the device, leaves included, and
            ``weights_host`` what is in host memory; ``gradients``: of the active slices, at most at a time;
            ``state_active`` and ``master_active``: what the base optimizer and the masters hold for the active
            slices, with ``residency="stream"`` the slots of the pages that state passes through; ``state_host``:
            host memory, or files, of all chunks that have been active (on a CPU the active chunk uses its part of
            it in place), with paging of all chunks from the start.
        """
        if self._ready:
            settle(self)
        weights = weight_nbytes(self._attachment)
        leaves = [leaf for _, leaf in self._attachment.active()]
        state, master = self._residency.nbytes()
        return {
            "weights": weights["weights"] + weights["leaves"],
            "weights_host": weights["weights_host"],
            "gradients": self._residency.gradient_nbytes(leaves),
            "state_active": state,
            "master_active": master,
            "state_host": self._store.nbytes,
        }

    def saved_activations(self) -> saved_activations:
        """Context manager that counts what autograd saves in it (``chunkft.saved_activations``) for the next report."""
        saved = saved_activations(self._attachment.model)
        self._memory.watch(saved)
        return saved

    def memory_report(self) -> MemoryReport:
        """Bytes of weights, gradients, state, masters and activations: predicted, now, at their peak since the last
        report, and what full fine-tuning would hold.
        """
        self._check_attached("memory_report")
        settle(self)
        return self._memory.report(self)

    def traffic(self) -> dict[str, int]:
        """Bytes that this process sent to others of its group since the last call.

        Returns:
            ``gradients``: to their owners; ``weights``: updated slices of replicas; ``control``: what ranks agree on.
            What FSDP2 and ``DistributedDataParallel`` send is not counted. All 0 in one process.
        """
        return dict.fromkeys(KINDS, 0) if self._team is None else self._team.traffic()

    def paging(self) -> PagingReport | None:
        """What paging moved since the last call, how much of it was exposed, and how many chunks would hide it.

        Returns:
            None if state is not paged.
        """
        if not isinstance(self._store, PagedStore):
            return None
        stats = [pager.stats() for pager in self._store.pagers.values()]
        return self._meter.report(stats, self.updates + self.skipped, len(self.plan))

    def detach(self) -> None:
        """Give the model back as it was, trained: what was trainable is so again, no operator of chunkft left.

        Nothing happens if that was done before.
        """
        if self._ready:
            self._release(keep_attached=False)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, because it shares memory with its model; save "
            "state_dict(), or chunkft.save_checkpoint(optimizer, path), and load it into a new optimizer"
        )

    def _release(self, keep_attached: bool) -> None:
        """Take everything out of the model again, and let go of all state."""
        attachment = self._attachment
        replicas = getattr(self, "_replicas", None)
        if replicas is not None:
            replicas.close()
        if self._team is not None:
            self._team.release()
        if self._is_attached():
            if keep_attached:
                attachment.release()
            else:
                attachment.detach()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.detach()
        if not self._ready:
            return
        self._ready = False
        self._switch = None
        if self._switch_hook is not None:
            self._switch_hook.remove()
            self._switch_hook = None
        self._residency.forget()
        self._store.clear()
        self.state.clear()
        for group in self.param_groups:
            group["params"] = []

    def _is_attached(self) -> bool:
        return self._attachment.is_attached

    def _check_attached(self, method: str) -> None:
        if not self._ready or not self._is_attached():
            raise RuntimeError(f"{method}() after detach() is not possible; build a new optimizer")

    def _check_idle(self, method: str) -> None:
        if at_work(self):
            raise RuntimeError(
                f"{method}() inside of step(), as from a signal handler, is not possible: some slices are updated and "
                "others not; note the signal, and do it after step()"
            )

    def _check_between_steps(self, method: str) -> None:
        if isinstance(self._residency, BackwardResidency) and self._residency.begun:
            raise RuntimeError(
                f"{method}() between backward() and step() is not possible with update='backward', which has "
                "updated some slices and not others by then; call step() first"
            )

    def _noise_seed(self) -> str:
        return f"{self._seed}/{self.updates}"

    def _follow_weights(self) -> None:
        self._attachment.verify()
        self._bind_replaced()  # what noticed a new weight may have failed here before
        if self._team is not None:
            self._team.follow()
        self._residency.follow_devices()

    def _bind_replaced(self) -> None:
        if self._ready and self._attachment.wiring.generation != self._generation:
            with torch.inference_mode(False), torch.no_grad():
                bind(self)

    def _chunk_of(self, interval_index: int) -> int:
        return active_chunk(self._schedule, interval_index, len(self.plan), self._seed)

    def _rule(self) -> UpdateRule:
        make_base = partial(_base_of, self._base_class, self._base_kwargs)
        return UpdateRule(self._base_class, make_base, self.param_groups, self._group_of, self._modes)

    def _slice_states(self) -> dict[Slice, State]:
        """The state of every slice that has some, by slice, where it is now."""
        return self._residency.states()


def _beside_gpu(attachment: Attachment) -> bool:
    return attachment.device.type == "cuda"


def _base_of(
    base: type[torch.optim.Optimizer], options: dict[str, Any], groups: Groups
) -> torch.optim.Optimizer:
    return base(groups, **options)
