"""How long a step takes, from counted operations and bytes at stated speeds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import nn

from chunkft.optim.planner.estimate import Model
from chunkft.optim.planner.setting import Machine, Setting
from chunkft.plan import parameter_owners

__all__ = ["Clock", "Seconds", "Traffic"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of a step over the link, on average over a sweep.

    Attributes:
        inputs: of blocks, to host memory and back.
        weights_in: weights to the device.
        weights_out: weights back.
        state_in, state_out: optimizer state.
        gradients_out: gradients of weights that are updated on the host.
    """

    inputs: int
    weights_in: int
    weights_out: int
    state_in: int
    state_out: int
    gradients_out: int

    @property
    def to_device(self) -> int:
        """All that goes to the device."""
        return self.inputs + self.weights_in + self.state_in

    @property
    def to_host(self) -> int:
        """All that goes to the host."""
        return self.inputs + self.weights_out + self.state_out + self.gradients_out


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Parts of a step, on average over a sweep.

    Attributes:
        compute: products of the forward and backward pass.
        exposed: transfers that nothing hides.
        update: of the weights.
    """

    compute: float
    exposed: float
    update: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.exposed + self.update


@dataclass(frozen=True)
class _Work:
    """Elements, on average over the chunks: of all products, of those that gradients flow through, of active slices."""

    forward: float
    flow: float
    active: float
    recomputed: float


class Clock:
    """Times settings of a model on a machine."""

    def __init__(self, model: Model, machine: Machine) -> None:
        self._model = model
        self._machine = machine
        self._shares: dict[int, dict[int, float]] = {}

    def traffic(self, setting: Setting, interval: int) -> Traffic:
        """What goes over the link; ``interval``: steps of a chunk."""
        model, state = self._model, self._model.state(setting)
        chunks = len(model.windows(setting))
        each = sum(state.chunk_nbytes) / chunks
        on_host = setting.weights == "stream" and setting.update_on == "host"
        weights_in = weights_out = gradients = 0.0
        if setting.weights == "stream":
            assert model.units is not None
            stay = model.units.resident(setting.resident_blocks)
            pages = [0 if i in stay else block.nbytes for i, block in enumerate(model.units.blocks)]
            tiles = sum(sum(table.tiles) for table in model.units.tables)
            rows = sum(
                model.batch * model.tokens * table.shape[1] * table.dtype.itemsize
                for table in model.units.tables
                if table.gathers
            )
            shares = self._lowest(setting)
            back = sum(share * (sum(pages[lowest:]) + tiles) for lowest, share in shares.items())
            weights_in = sum(pages) + tiles + rows + back
            active = sum(self._model.parameters[name].nbytes for name in model.streamed(setting))
            if on_host:
                gradients = active / chunks
            else:  # copies of the active slices come at a switch, and go back
                weights_in += active / chunks / interval
                weights_out = active / chunks / interval
        if on_host:
            each = 0.0  # that of what stays on the device is left out: norms and biases, as a rule
        per_step = each if setting.residency == "stream" else each / interval
        inputs = self._model.host(setting).activations
        return Traffic(
            inputs=inputs,
            weights_in=int(weights_in),
            weights_out=int(weights_out),
            state_in=int(per_step),
            state_out=int(per_step),
            gradients_out=int(gradients),
        )

    def seconds(self, setting: Setting, interval: int) -> Seconds:
        """Predicted parts of a step.

        Transfers of weights run beside the products and cost what they take longer. State that passes by in ``step()``
        is exposed, in the backward pass it runs beside that; state that stays for an interval comes beside its last
        step.
        An update on the host is taken to run after the backward pass.
        """
        machine, moved = self._machine, self.traffic(setting, interval)
        work = self._work(setting)
        tokens = self._model.batch * self._model.tokens
        elements = work.forward + work.flow + work.active
        if setting.checkpointing if setting.checkpointing is not None else self._model.checkpoints:
            elements += work.recomputed
        compute = 2 * tokens * elements / machine.flops
        backward = 2 * tokens * (work.flow + work.active) / machine.flops
        one_way = max(moved.weights_in, moved.weights_out + moved.gradients_out) + moved.inputs
        weights = one_way / machine.link
        exposed = max(0.0, weights - compute)
        speed = machine.link if not setting.in_files else min(machine.link, machine.disk_bandwidth)
        state = max(moved.state_in, moved.state_out) / speed
        if setting.update == "backward":
            exposed += max(0.0, state - max(0.0, backward - weights))
        elif setting.residency == "stream":
            exposed += state
        else:
            exposed += max(0.0, state - compute / interval)
        return Seconds(compute=compute, exposed=exposed, update=self._update(setting))

    def _update(self, setting: Setting) -> float:
        model = self._model
        chunks = len(model.windows(setting))
        nbytes = 2 * sum(model.state(setting).chunk_nbytes) / chunks  # read and written
        nbytes += 3 * model.weights / chunks
        on_host = setting.weights == "stream" and setting.update_on == "host"
        return nbytes / (self._machine.host_bandwidth if on_host else self._machine.gpu_bandwidth)

    def _lowest(self, setting: Setting) -> dict[int, float]:
        """Share of the chunks by the first block that gradients flow through; those that flow through none left out."""
        if setting.chunks not in self._shares:
            windows = self._model.windows(Setting(chunks=setting.chunks))
            found: dict[int, float] = {}
            for window in windows:
                lowest = self._model.lowest(window)
                if lowest is not None:
                    found[lowest] = found.get(lowest, 0.0) + 1 / len(windows)
            self._shares[setting.chunks] = found
        return self._shares[setting.chunks]

    def _work(self, setting: Setting) -> _Work:
        blocks, outside = self._products
        everything = sum(blocks) + outside
        flow = recomputed = 0.0
        for lowest, share in self._lowest(setting).items():
            above = share * sum(blocks[lowest:])
            recomputed += above
            flow += above + share * outside
        return _Work(everything, flow, everything / setting.chunks, recomputed)

    @functools.cached_property
    def _products(self) -> tuple[list[int], int]:
        """Elements of the matrices that are not only looked up in, for each block and outside of them."""
        model = self._model
        owners = parameter_owners(model.deep)
        blocks, outside = [0] * len(model.shallow.deep), 0
        for name, parameter in model.parameters.items():
            if parameter.dim() < 2 or all(isinstance(module, nn.Embedding) for module, _ in owners[name]):
                continue
            block = model.block_of(name)
            if block is None:
                outside += math.prod(parameter.shape)
            else:
                blocks[block] += math.prod(parameter.shape)
        return blocks, outside
