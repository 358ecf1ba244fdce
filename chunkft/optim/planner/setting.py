"""The choices that a plan makes, and the machine that it makes them for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DEFAULTS", "Machine", "Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train a model.

    Attributes:
        chunks: K.
        residency: ``"chunk"`` or ``"stream"``, as for ``ChunkOptimizer``.
        update: ``"step"`` or ``"backward"``, likewise.
        weights: ``"resident"`` or ``"stream"``.
        update_on: where streamed weights are updated: ``"host"`` or ``"device"``.
        resident_blocks: blocks that stay on the device where weights stream.
        state_bits: of each moment of AdamW, 32 or 8.
        checkpointing: whether blocks are recomputed in the backward pass; None: as the model has it.
        master: as for ``ChunkOptimizer``.
        in_files: whether files hold the state in place of host memory.
        offload_inputs: whether inputs of blocks of streamed weights wait in host memory; the blocks are recomputed then
            without the model's own checkpointing.
    """

    chunks: int = 32
    residency: str = "chunk"
    update: str = "step"
    weights: str = "resident"
    update_on: str = "device"
    resident_blocks: int = 0
    state_bits: int = 32
    checkpointing: bool | None = None
    master: str = "auto"
    in_files: bool = False
    offload_inputs: bool = False

    @property
    def arrangement(self) -> tuple[Any, ...]:
        """All of it but the number of chunks."""
        return tuple(value for name, value in asdict(self).items() if name != "chunks")

    @property
    def complexity(self) -> int:
        """How many things are not as they are by default; what rounds the moments counts for several."""
        found: int = sum(bool(getattr(self, name) != value) for name, value in DEFAULTS.items())
        return (
            found + bool(self.checkpointing) + self.in_files + 4 * (self.state_bits != DEFAULTS["state_bits"])
        )

    def arguments(self) -> dict[str, Any]:
        """Keywords of ``ChunkAdamW`` that are not as they are by default, and always ``chunks``."""
        found: dict[str, Any] = {"chunks": self.chunks}
        for name, value in DEFAULTS.items():
            if getattr(self, name) != value and (name != "resident_blocks" or self.weights == "stream"):
                found[name] = getattr(self, name)
        if self.weights == "stream":
            found["update_on"] = self.update_on
        return found

    def __str__(self) -> str:
        words = [f"chunks={self.chunks}", f"residency={self.residency!r}"]
        words += [
            f"{name}={value!r}"
            for name, value in self.arguments().items()
            if name not in ("chunks", "residency")
        ]
        if self.checkpointing is not None:
            words.append(f"checkpointing={'on' if self.checkpointing else 'off'}")
        if self.in_files:
            words.append("state in files")
        return ", ".join(words)


DEFAULTS = {
    "residency": "chunk",
    "update": "step",
    "weights": "resident",
    "resident_blocks": 0,
    "offload_inputs": False,
    "state_bits": 32,
    "master": "auto",
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan has to fit, and the speeds that its time is predicted with.

    Attributes:
        gpu: bytes of memory of the GPU.
        host: bytes of host memory for weights, state and gradients; None: not limited.
        disk: bytes of files for the state; None: no files.
        link: bytes a second between host and GPU, each way.
        flops: 16-bit floating-point operations a second that products of a step reach.
        gpu_bandwidth: bytes a second of GPU memory that an update reaches.
        host_bandwidth: bytes a second of host memory that an update on the host reaches.
        disk_bandwidth: bytes a second of the files.
        processes: replicas on this machine, which share host memory and disk.
        device: ``"cuda"``, or ``"cpu"`` for a model that is trained on one.
    """

    gpu: int
    host: int | None = None
    disk: int | None = None
    link: float = 25e9
    flops: float = 100e12
    gpu_bandwidth: float = 800e9
    host_bandwidth: float = 20e9
    disk_bandwidth: float = 2e9
    processes: int = 1
    device: str = "cuda"
