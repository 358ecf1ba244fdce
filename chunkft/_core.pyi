from collections.abc import Sequence
from typing import Literal, SupportsIndex, TypedDict

from typing_extensions import Buffer, CapsuleType

__version__: str

class ArenaView(Buffer):
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class HostArena:
    def __init__(
        self,
        nbytes: SupportsIndex,
        *,
        huge_pages: bool = True,
        pretouch: bool = False,
        threads: SupportsIndex = 0,
        within_budget: bool = False,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def huge_pages(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def page_locked(self) -> bool: ...
    def page_lock(self, device: SupportsIndex = 0) -> None: ...
    def close(self) -> None: ...
    def view(self, offset: SupportsIndex, nbytes: SupportsIndex) -> ArenaView: ...
    @staticmethod
    def live_bytes() -> int: ...

class CudaDevice(TypedDict):
    name: str
    total_bytes: int
    compute_capability: tuple[int, int]

class CudaInfo(TypedDict):
    library: str
    driver_version: tuple[int, int]
    devices: list[CudaDevice]

class MemoryBudget(TypedDict):
    limit: int
    available: int
    source: str

def cuda_info() -> CudaInfo: ...
def memory_budget() -> MemoryBudget | None: ...

# addresses of weight, gradient, first and second moment, master or residual, and scales of the moments (0: none);
# elements, those of a row of the weight, and those from row to row; formats of the first four ("fp32", "bf16", "fp16",
# moments also "codes"); seed; 1 - lr weight_decay, lr / (1 - beta1^t), sqrt(1 - beta2^t)
HostAdamwSlice = tuple[
    tuple[int, int, int, int, int, int, int],
    tuple[int, int, int],
    tuple[str, str, str, str],
    int,
    tuple[float, float, float],
]

def host_adamw(
    slices: Sequence[HostAdamwSlice],
    *,
    master: str,
    pull: float,
    beta2: float,
    keep2: float,
    eps: float,
    grad_factor: float,
    clip_factor: float,
    threads: SupportsIndex,
) -> None: ...

class Transfers(TypedDict):
    copies: int
    bytes: int
    timed_bytes: int
    timed_ns: int

class PagerStats(TypedDict):
    loads: Transfers
    stores: Transfers
    acquires: int
    waits: int
    exposed_ns: int
    host_stall_ns: int
    untimed: int
    events_created: int
    streams_created: int

class Pager:
    def __init__(
        self,
        pages: Sequence[SupportsIndex],
        host: Sequence[SupportsIndex],
        slots: Sequence[SupportsIndex],
        slot_bytes: SupportsIndex,
        *,
        backend: Literal["host", "cuda"] = "host",
        device: SupportsIndex = 0,
        keep: object = None,
        trace_events: SupportsIndex = 4096,
    ) -> None: ...
    def prefetch(self, page: SupportsIndex) -> bool: ...
    def acquire(self, page: SupportsIndex, stream: SupportsIndex = 0, *, load: bool = True) -> int: ...
    def release(
        self, page: SupportsIndex, stream: SupportsIndex = 0, *, dirty: bool = True, keep: bool = False
    ) -> None: ...
    def write_back(self, page: SupportsIndex) -> None: ...
    def evict(self, page: SupportsIndex) -> None: ...
    def discard(self, page: SupportsIndex, stream: SupportsIndex | None = None) -> None: ...
    def flush(self) -> None: ...
    def state(self, page: SupportsIndex) -> str: ...
    def host_is_canonical(self, page: SupportsIndex) -> bool: ...
    def stats(self) -> PagerStats: ...
    # kind ("load", "store", "wait"), page, slot, bytes, submitted, started, ended (ns of the steady clock)
    def trace(self) -> list[tuple[str, int, int, int, int, int, int]]: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def backend(self) -> str: ...
