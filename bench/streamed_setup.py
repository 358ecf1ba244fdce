"""What `bench.streamed` times: steps of a model whose weights stream or stay, and the page traffic of a step alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import chunkft
from chunkft.streaming import Pager
from chunkft.weights import WeightStream

from . import plain_llama

LR = 1e-6  # so small that weights stay what they are in the ablation whose values are stale


@dataclass(frozen=True)
class Setting:
    """A case: what is trained, and how it streams.

    Attributes:
        model: name of a shape in `plain_llama.SHAPES`.
        tokens: of the one sequence of a batch.
        resident: blocks that stay on the device.
        positions: how many blocks are trained, evenly spread, one at a time: each is a chunk, and stands for its
            part of the depth. The weights of other blocks are frozen, so that state for all of them is not needed.
        rounds: timed rounds at each position.
        tile_bytes: of the head; None for the default.
        page_bytes: of state, where it streams too.
    """

    model: str
    tokens: int
    resident: int
    positions: int
    rounds: int
    tile_bytes: int | None
    page_bytes: int
    device: torch.device
    dtype: torch.dtype

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers of the blocks that are trained."""
        layers = plain_llama.SHAPES[self.model].layers
        return tuple((2 * i + 1) * layers // (2 * self.positions) for i in range(self.positions))


# options of the optimizer by place of weights and update
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"update_on": "host"},
    "device": {"update_on": "device", "residency": "stream"},
}


class Trial:
    """A model with its optimizer in one of `PLACES`; blocks are checkpointed, and the head makes no logits.

    Args:
        place: where its weights live and are updated.
        setting: of the case.
        interval: steps that a block is trained before the next one.
    """

    def __init__(self, place: str, setting: Setting, interval: int) -> None:
        self.place, self.setting = place, setting
        before = torch.get_default_dtype()
        torch.set_default_dtype(setting.dtype)
        try:
            with torch.device("meta"):
                self.model = plain_llama.PlainLlama(plain_llama.SHAPES[setting.model], True).train()
        finally:
            torch.set_default_dtype(before)
        self.model.active_rows_of_head = list
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"blocks.{i}.") for i in setting.trained))
        self.stream: WeightStream | None = None
        options = dict(PLACES[place])
        if place == "resident":
            self.model.to_empty(device=setting.device)
        else:
            self.stream = WeightStream(
                self.model,
                device=setting.device,
                resident_blocks=setting.resident,
                tile_bytes=setting.tile_bytes,
            )
            options["weights"] = self.stream
        if "residency" in options:
            options["page_bytes"] = setting.page_bytes
        _fill(self.model, setting.device)
        self.optimizer = chunkft.ChunkAdamW(
            self.model, lr=LR, chunks=setting.positions, partition="layers", interval=interval, **options
        )
        self.ids = plain_llama.batch_of(setting.model, setting.device, 1, setting.tokens)
        self.loss = float("nan")

    def step(self) -> tuple[float, float]:
        """Seconds of forward and backward, and of the update."""
        self._settle()
        start = time.perf_counter()
        loss = self.model(self.ids)
        loss.backward()
        self._settle()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._settle()
        end = time.perf_counter()
        self.loss = float(loss.detach())
        return middle - start, end - middle

    def stale_step(self) -> tuple[float, float]:
        """The same with weights that do not come: slots are handed out with what is in them."""
        with without_copies(self._stream):
            return self.step()

    def traffic(self) -> tuple[float, float]:
        """Seconds of the page traffic of a step, in its order; nothing is computed."""
        self._settle()
        start = time.perf_counter()
        page_traffic(self._stream, self.lowest)
        self._settle()
        return time.perf_counter() - start, 0.0

    @property
    def lowest(self) -> int:
        """The lowest page that the backward pass needs: as many pages are below the block that is trained."""
        stream, number = self._stream, self.setting.trained[self.optimizer.active]
        stay = stream.units.resident(stream.resident_blocks)
        return sum(i not in stay for i in range(number))

    def loaded(self) -> int:
        """Bytes of weights that came to the device so far."""
        return sum(pager.stats().loaded_bytes for pager in self._stream.pagers.values())

    def expected(self) -> int:
        """Bytes of weights that a step brings to the device."""
        return step_bytes(self._stream, self.lowest)

    def close(self) -> None:
        """Gives the memory up."""
        self.optimizer.detach()
        if self.stream is not None:
            self.stream.detach()

    @property
    def _stream(self) -> WeightStream:
        assert self.stream is not None
        return self.stream

    def _settle(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)


@torch.no_grad()
def _fill(model: nn.Module, device: torch.device) -> None:
    """Random weights, the same ones wherever they live; they come from the device, which is the faster one."""
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() > 1:
            generator = torch.Generator(device).manual_seed(number)
            values = torch.randn(parameter.shape, dtype=parameter.dtype, device=device, generator=generator)
            parameter.data.copy_(values.mul_(0.02))
        else:
            parameter.data.fill_(1)


class Uncopied:
    """A pager whose pages come to their slots at once, without their bytes; all else is the pager's."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pager, name)

    def prefetch(self, page: int) -> bool:
        """Nothing is on its way."""
        return True

    def acquire(self, page: int) -> Tensor:
        """The slot, as it is."""
        return self._pager.acquire(page, load=False)


@contextmanager
def without_copies(stream: WeightStream) -> Iterator[None]:
    """Inside, blocks and tiles are handed out with whatever is in their slots."""
    assert stream.ring is not None
    holders: list[Any] = [stream.ring]
    if stream.tile_pages is not None:
        holders.append(stream.tile_pages)
    pagers = [holder.pager for holder in holders]
    for holder, pager in zip(holders, pagers, strict=True):
        holder.pager = Uncopied(pager)
    try:
        yield
    finally:
        for holder, pager in zip(holders, pagers, strict=True):
            holder.pager = pager


def page_traffic(stream: WeightStream, lowest: int) -> None:
    """Brings what a step brings to the device, in that order: blocks, tiles for the loss and for its gradients, blocks
    down to `lowest`.
    """
    ring = stream.ring
    assert ring is not None
    count = len(ring.blocks)
    ring.refresh()
    for number in range(count):
        ring.hold(number)
        if number + 1 < count:
            ring.fetch(number + 1)
        ring.leave(number)
    for tiles in stream.tiles.values():
        for _ in range(2):
            for _ in tiles.walk():
                pass
    for number in reversed(range(lowest, count)):
        ring.hold(number)
        if number > lowest:
            ring.fetch(number - 1)
        ring.leave(number)


def step_bytes(stream: WeightStream, lowest: int) -> int:
    """Bytes of weights that a step has to bring to the device.

    Forward: all blocks that stream. Backward: those down to `lowest`, but for those that the ring holds still at the
    end of the forward pass. A head that makes no logits: all tiles twice.
    """
    ring = stream.ring
    assert ring is not None
    sizes = [block.nbytes for block in ring.blocks]
    back = sizes[lowest : max(lowest, len(sizes) - ring.slots)]
    return sum(sizes) + sum(back) + 2 * sum(sum(table.tiles) for table in stream.units.tables)


Run = Callable[[], tuple[float, float]]


def variants(trials: dict[str, Trial]) -> dict[str, tuple[Trial, Run]]:
    """What takes a turn in every round: steps of each place, each without copies too, and the traffic alone."""
    found: dict[str, tuple[Trial, Run]] = {}
    for place, trial in trials.items():
        found[place] = trial, trial.step
        if place != "resident":
            found[f"{place}, no copy"] = trial, trial.stale_step
    streamed = [trial for place, trial in trials.items() if place != "resident"]
    if streamed:
        found["no compute"] = streamed[0], streamed[0].traffic
    return found


def made(setting: Setting, places: Sequence[str]) -> dict[str, Trial]:
    """A trial for each place; each changes to the next block after the rounds of a position, two of them untimed."""
    rounds = setting.rounds + 2
    return {place: Trial(place, setting, rounds * (1 if place == "resident" else 2)) for place in places}
