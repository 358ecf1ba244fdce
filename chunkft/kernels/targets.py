"""Limits and speeds of the GPUs that the kernels are made for; plain figures, no GPU needed.

Limits are from NVIDIA's CUDA C++ Programming Guide (table of compute capabilities), speeds from the data sheets of
the products: dense figures without sparsity, 16-bit products with fp32 accumulation, boost clock.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# bytes of shared memory that one block may ask for
_SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Target:
    """One GPU: name, compute capability (90 is 9.0), and what bounds a kernel on it.

    Memory speed in GB/s, arithmetic in TFLOP/s, ``l2`` and ``shared_memory`` (a block) in bytes.
    """

    name: str
    capability: int
    multiprocessors: int
    bandwidth: float
    tflops_16bit: float
    tflops_tf32: float
    tflops_fp32: float
    l2: int
    shared_memory: int

    def tflops(self, itemsize: int, tf32: bool = False) -> float:
        """Peak TFLOP/s of a product of operands of this many bytes."""
        if itemsize <= 2:
            return self.tflops_16bit
        return self.tflops_tf32 if tf32 else self.tflops_fp32


def _target(
    name: str,
    capability: int,
    multiprocessors: int,
    bandwidth: float,
    speeds: tuple[float, float, float],
    l2_mib: int,
) -> Target:
    limit = _SHARED_MEMORY[capability]
    return Target(name, capability, multiprocessors, bandwidth, *speeds, l2_mib << 20, limit)


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _target("a100", 80, 108, 2039, (312, 156, 19.5), 40),
        _target("rtx3090", 86, 82, 936, (71, 35.6, 35.6), 6),
        _target("rtx4090", 89, 128, 1008, (165.2, 82.6, 82.6), 72),
        _target("h100", 90, 132, 3350, (989, 494, 67), 50),
        _target("h200", 90, 132, 4800, (989, 494, 67), 50),
        _target("b200", 100, 148, 8000, (2250, 1125, 75), 126),
        _target("rtx5090", 120, 170, 1792, (209.5, 104.8, 104.8), 96),
    )
}
# who stands for a capability where only that is known
_REPRESENTATIVE = {80: "a100", 86: "rtx3090", 89: "rtx4090", 90: "h100", 100: "b200", 120: "rtx5090"}


def family(capability: int) -> int:
    """The compute capability, among those known here, whose limits hold for ``capability``.

    The highest known one of the same major version that is not newer, e.g. 103 -> 100, 121 -> 120.

    Raises:
        ValueError: for a GPU older than compute capability 8.0, or of an unknown major version.
    """
    known = [c for c in _SHARED_MEMORY if c // 10 == capability // 10 and c <= capability]
    if not known:
        raise ValueError(
            f"compute capability {capability / 10} is not supported; known are {sorted(_SHARED_MEMORY)} (in tenths)"
        )
    return max(known)


def shared_memory_limit(capability: int) -> int:
    """Bytes of shared memory that one block may ask for on a GPU of this compute capability."""
    return _SHARED_MEMORY[family(capability)]


def target_of(capability: int, name: str = "", multiprocessors: int = 0) -> Target:
    """The known GPU that fits best: by product name, else by capability; with the true number of multiprocessors.

    Args:
        capability: compute capability in tenths.
        name: as the driver gives it, e.g. ``"NVIDIA H200"``.
        multiprocessors: 0 where unknown.

    Raises:
        ValueError: if the capability is not supported.
    """
    base = family(capability)
    plain = name.lower().replace(" ", "")
    match = [t for t in TARGETS.values() if t.capability == base and t.name in plain]
    chosen = match[0] if match else TARGETS[_REPRESENTATIVE[base]]
    return dataclasses.replace(chosen, multiprocessors=multiprocessors) if multiprocessors else chosen
