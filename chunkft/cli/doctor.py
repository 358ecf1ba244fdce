"""`chunkft doctor`: what this machine gives to paging, measured."""

import json
from pathlib import Path
from typing import Any

from chunkft.cli.errors import UserError
from chunkft.cli.machine import disk_bandwidth, facts, link_bandwidth, memcpy_bandwidth
from chunkft.cli.settings import DoctorSettings

__all__ = ["examine", "lines_of", "show_doctor"]


def examine(settings: DoctorSettings) -> dict[str, Any]:
    """Returns all facts and measurements, bandwidths in bytes per second; raises UserError for a directory that
    cannot be used.
    """
    nbytes = settings.mib << 20
    found = facts() | {"measured_bytes": nbytes, "memcpy": memcpy_bandwidth(nbytes), "disk": None}
    for index, gpu in enumerate(found["gpus"]):
        try:
            gpu["link"] = link_bandwidth(index, nbytes)
        except (RuntimeError, OSError) as error:
            gpu["link"] = {"missing": str(error)}
    if settings.dir is not None:
        directory = Path(settings.dir)
        if not directory.is_dir():
            raise UserError(f"--dir {settings.dir}: not a directory")
        try:
            found["disk"] = disk_bandwidth(directory, nbytes)
        except OSError as error:
            raise UserError(f"--dir {settings.dir}: {error.strerror or error}") from error
    return found


def lines_of(found: dict[str, Any]) -> list[str]:
    """The findings as text, one a line."""
    cuda = found["torch_cuda"]
    driver = found["driver"]
    memory = found["memory"]
    lock = found["lockable_bytes"]
    lines = [
        f"chunkft    {found['chunkft']}, Python {found['python']}, torch {found['torch']}"
        f" ({'CUDA ' + cuda if cuda else 'without CUDA'})",
        f"processor  {found['processor']}, {found['cores']} cores",
        f"driver     {driver['missing']}"
        if "missing" in driver
        else f"driver     {driver['library']}, for CUDA up to {driver['cuda_version']}",
    ]
    for index, gpu in enumerate(found["gpus"]):
        node = "" if gpu["numa_node"] in (None, -1) else f", NUMA node {gpu['numa_node']}"
        lines.append(
            f"gpu {index}      {gpu['name']}, {_gib(gpu['memory_bytes'])}, sm {gpu['compute_capability']}{node}"
        )
        lines.append(f"link {index}     {_link(gpu['link'])}")
    if not found["gpus"]:
        lines.append("gpu        none that torch can use: optimizer state stays in host memory")
    lines.append(f"memcpy     {_rate(found['memcpy'])} by one thread")
    lines.append(
        "memory     the system does not tell how much there is"
        if memory is None
        else f"memory     {_gib(memory['available'])} left of {_gib(memory['limit'])} ({memory['source']})"
    )
    lines.append(
        "lockable   "
        + ("as much as there is" if lock is None else f"{_gib(lock)} without privileges (ulimit -l)")
        + "; the CUDA driver locks memory by itself"
    )
    for node in found["numa_nodes"]:
        lines.append(f"numa {node['node']}     cores {node['cores'] or 'none'}, {_gib(node['memory_bytes'])}")
    disk = found["disk"]
    if disk is not None:
        way = "past the page cache" if disk["bypasses_page_cache"] else "through the page cache"
        lines.append(
            f"disk       {disk['directory']}: write {_rate(disk['write'])}, read {_rate(disk['read'])} with"
            f" checksums, {way}; {_gib(disk['free_bytes'])} free"
        )
    return lines


def show_doctor(settings: DoctorSettings) -> int:
    """Prints the findings, writes them as JSON if asked to, and returns the exit status."""
    target = None if settings.json is None else Path(settings.json)
    if target is not None and not target.parent.is_dir():
        raise UserError(f"--json {settings.json}: its directory does not exist")
    found = examine(settings)
    print("\n".join(lines_of(found)))
    if target is not None:
        try:
            target.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {settings.json}: cannot be written: {error.strerror}") from error
        print(f"written: {target}")
    return 0


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"


def _link(link: dict[str, Any]) -> str:
    if "missing" in link:
        return f"not measured: {link['missing']}"
    return (
        f"to the GPU {_rate(link['load'])}, back {_rate(link['store'])}, both at once {_rate(link['both'])};"
        f" from memory that is not page-locked {_rate(link['pageable_load'])} and {_rate(link['pageable_store'])}"
    )
