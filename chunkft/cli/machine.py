"""What a machine gives to paging: facts of driver, memory and NUMA nodes, and bandwidths that are measured."""

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import chunkft
from chunkft.streaming import HostArena, cuda_info, memory_budget
from chunkft.streaming.files import PageFile, padded
from chunkft.streaming.workers import Workers

__all__ = ["disk_bandwidth", "facts", "link_bandwidth", "memcpy_bandwidth"]

REPEATS = 5
FILE_PAGES = 4


def facts() -> dict[str, Any]:
    """Versions, processor, driver, GPUs, memory limits and NUMA nodes; null where the system does not tell."""
    return {
        "chunkft": chunkft.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "driver": _driver(),
        "gpus": [
            _gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
        "lockable_bytes": _lockable(),
        "memory": memory_budget(),
        "numa_nodes": _numa_nodes(),
    }


def memcpy_bandwidth(nbytes: int) -> float:
    """Bytes per second that one thread copies in memory, a copy counted once: the median of some."""
    with HostArena(2 * nbytes, within_budget=True, pretouch=True) as arena:
        source, target = arena.tensor(0, nbytes, torch.uint8), arena.tensor(nbytes, nbytes, torch.uint8)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _rate(nbytes, lambda: target.copy_(source))
        finally:
            torch.set_num_threads(threads)


def link_bandwidth(index: int, nbytes: int) -> dict[str, float]:
    """Bytes per second between host and GPU `index`: each way, both ways at once (their sum), and each way
    from memory that is not page-locked. One large copy is timed, by events, as the median of some.
    """
    device = torch.device("cuda", index)
    with HostArena(2 * nbytes, within_budget=True, pretouch=True) as arena:
        up, down = (arena.tensor(i * nbytes, nbytes, torch.uint8) for i in range(2))
        to, back = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        one, two = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

        def load() -> None:
            with torch.cuda.stream(one):
                to.copy_(up, non_blocking=True)

        def store() -> None:
            with torch.cuda.stream(two):
                down.copy_(back, non_blocking=True)

        def both() -> None:
            load()
            store()

        def rate(work: Callable[[], None], count: int = 1) -> float:
            def run() -> None:
                work()
                torch.cuda.synchronize(device)

            return _rate(count * nbytes, run)

        found = {"pageable_load": rate(load), "pageable_store": rate(store)}
        arena.page_lock(index)
        return {"load": rate(load), "store": rate(store), "both": rate(both, 2)} | found


def disk_bandwidth(directory: Path, nbytes: int) -> dict[str, Any]:
    """Bytes per second that `Pager(state_dir=directory)` would read and write, checksums and sync included.

    Writes and removes a file of about `nbytes`. Raises OSError if the directory cannot be written or is full.
    """
    size = max(nbytes // FILE_PAGES, 1)
    workers = Workers(4, "chunkft-doctor")
    try:
        with TemporaryDirectory(dir=directory, prefix="chunkft-doctor-") as room:
            file = PageFile(room, [size] * FILE_PAGES, workers, reopen=False)
            try:
                with HostArena(padded(size), within_budget=True) as arena:
                    arena.tensor(0, padded(size), torch.uint8).random_(0, 256)
                    buffer = arena.buffer(0, padded(size))

                    def write_all() -> None:
                        for page in range(FILE_PAGES):
                            file.write(page, buffer)
                        file.commit()

                    def read_all() -> None:
                        for page in range(FILE_PAGES):
                            file.read(page, buffer)

                    write, read = _seconds(write_all), _seconds(read_all)
            finally:
                file.close()
            status = os.statvfs(room)
    finally:
        workers.close()
    return {
        "directory": str(directory),
        "free_bytes": status.f_bavail * status.f_frsize,
        "bypasses_page_cache": file.direct,
        "write": FILE_PAGES * size / write,
        "read": FILE_PAGES * size / read,
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rate(nbytes: int, work: Callable[[], object]) -> float:
    work()
    return nbytes / sorted(_seconds(work) for _ in range(REPEATS))[REPEATS // 2]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> dict[str, Any]:
    try:
        info = cuda_info()
    except RuntimeError as error:
        return {"missing": str(error)}
    return {"library": info["library"], "cuda_version": ".".join(map(str, info["driver_version"]))}


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    # Newer versions of torch tell the place on the bus.
    place: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    name = "?" if None in place else "{:04x}:{:02x}:{:02x}.0".format(*place)
    node = Path("/sys/bus/pci/devices") / name / "numa_node"
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "numa_node": int(node.read_text()) if node.exists() else None,
    }


def _lockable() -> int | None:
    """Bytes that the process may lock; None: as many as it likes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _numa_nodes() -> list[dict[str, Any]]:
    nodes = []
    for path in sorted(
        Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])
    ):
        memory = next(
            (line for line in (path / "meminfo").read_text().splitlines() if "MemTotal:" in line), "0 kB"
        )
        nodes.append(
            {
                "node": int(path.name[4:]),
                "cores": (path / "cpulist").read_text().strip(),
                "memory_bytes": int(memory.split()[-2]) * 1024,
            }
        )
    return nodes
