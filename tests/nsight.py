"""What ``nsys``, ``ncu`` and ``compute-sanitizer`` take, as far as the documentation and the Makefile use it, and a
check of command lines against it.

Sources: NVIDIA Nsight Systems User Guide, "CLI Profile Command Switch Options" and "CLI Stats Command Switch Options"
(docs.nvidia.com/nsight-systems/UserGuide); NVIDIA Nsight Compute CLI, "Command Line Options" and "NVTX Filtering"
(docs.nvidia.com/nsight-compute/NsightComputeCli); Compute Sanitizer, "Command Line Options"
(docs.nvidia.com/compute-sanitizer/ComputeSanitizer). Names of metrics: public reports of ncu on an H100.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Check = Callable[[str], bool]


def one_of(*allowed: str) -> Check:
    return lambda value: value in allowed


def some_of(*allowed: str) -> Check:
    return lambda value: all(part in allowed for part in value.split(","))


def matches(pattern: str) -> Check:
    return lambda value: re.fullmatch(pattern, value) is not None


FILE = matches(r"[\w%./-]+")
NUMBER = matches(r"\d+")
SWITCH = one_of("true", "false")

# Options of nsys are written --name=value; of stats --name value.
NSYS_PROFILE: dict[str, Check] = {
    "--trace": some_of("cuda", "nvtx", "osrt", "cublas", "cudnn", "cusparse", "mpi", "ucx", "none"),
    "--cuda-memory-usage": SWITCH,
    "--sample": one_of("process-tree", "system-wide", "none"),
    "--cpuctxsw": one_of("process-tree", "system-wide", "none"),
    "--capture-range": one_of("none", "cudaProfilerApi", "hotkey", "nvtx"),
    "--capture-range-end": matches(r"none|stop|stop-shutdown|repeat(:\d+)?|repeat-shutdown:\d+"),
    "--output": FILE,
    "--force-overwrite": SWITCH,
    "--stats": SWITCH,
    "--delay": NUMBER,
    "--duration": NUMBER,
}
NSYS_STATS: dict[str, Check] = {
    "--report": some_of(
        "cuda_api_sum",
        "cuda_gpu_kern_sum",
        "cuda_gpu_mem_size_sum",
        "cuda_gpu_mem_time_sum",
        "nvtx_pushpop_sum",
        "nvtx_sum",
        "osrt_sum",
    ),
    "--format": some_of("column", "table", "csv", "tsv", "json"),
    "--output": FILE,
    "--force-export": SWITCH,
}
# Those of 9.0 that are collected; of the section WarpStateStats come smsp__average_warps_issue_stalled_*.
METRICS = (
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
# None: takes no value.
NCU: dict[str, Check | None] = {
    "--set": one_of("basic", "detailed", "full", "roofline", "source", "nvlink"),
    "--profile-from-start": one_of("on", "off", "yes", "no", "1", "0"),
    "--nvtx": None,
    "--nvtx-include": matches(r"(regex:)?(?:[^\\/]|\\.)+/"),  # one range of push and pop
    "--nvtx-exclude": matches(r"(regex:)?(?:[^\\/]|\\.)+/"),
    "--launch-count": NUMBER,
    "--launch-skip": NUMBER,
    "--kernel-name": matches(r".+"),
    "--target-processes": one_of("all", "application-only"),
    "--export": FILE,
    "--force-overwrite": None,
    "--import": matches(r"[\w%./-]+\.ncu-rep"),
    "--section": one_of(
        *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats"),
        *("WarpStateStats", "InstructionStats", "LaunchStats", "Occupancy", "SourceCounters"),
    ),
    "--metrics": some_of(*METRICS),
    "--clock-control": one_of("base", "boost", "none", "reset"),
    "--cache-control": one_of("all", "none"),
    "--csv": None,
    "--page": one_of("details", "raw", "source", "session"),
    "--print-units": one_of("auto", "base"),
}
SANITIZER: dict[str, Check | None] = {
    "--tool": one_of("memcheck", "racecheck", "initcheck", "synccheck"),
    "--report-api-errors": one_of("all", "explicit", "no"),
    "--error-exitcode": NUMBER,
    "--target-processes": one_of("all", "application-only"),
}


def check_nsight(words: list[str]) -> list[str]:
    """Checks the options of a command line and gives the program that it starts, empty where a report is read.

    Raises ValueError naming what the program does not have.
    """
    if words[0] in ("ncu", "compute-sanitizer"):
        rest = _spaced(words[1:], NCU if words[0] == "ncu" else SANITIZER)
        reads = any(word.partition("=")[0] == "--import" for word in words)
        if reads == bool(rest):
            raise ValueError(f"{words[0]} reads a report or starts a program, got {rest or 'neither'}")
        return rest
    if words[:2] == ["nsys", "profile"]:
        rest = words[2:]
        while rest and rest[0].startswith("-"):
            name, sign, value = rest.pop(0).partition("=")
            _check(name, value if sign else None, NSYS_PROFILE)
        if not rest:
            raise ValueError("nsys profile without a program")
        return rest
    if words[:2] == ["nsys", "stats"]:
        rest = _spaced(words[2:], NSYS_STATS)
        if len(rest) != 1 or not rest[0].endswith((".nsys-rep", ".sqlite")):
            raise ValueError(f"nsys stats reads one report, got {rest}")
        return []
    raise ValueError(
        f"{' '.join(words[:2])!r} is not known; allowed are compute-sanitizer, ncu, nsys profile and nsys stats"
    )


def included(configuration: str, name: str) -> bool:
    """Whether ``--nvtx-include CONFIGURATION`` of one push/pop range takes in a range of this name."""
    regex = configuration.startswith("regex:")
    wanted = configuration.removeprefix("regex:").removesuffix("/")
    wanted = re.sub(r"\\([@,\[\]/*+])", lambda m: m[1] if not regex or m[1] == "/" else m[0], wanted)
    return re.fullmatch(wanted, name) is not None if regex else wanted == name


def _spaced(words: list[str], known: dict[str, Check | None] | dict[str, Check]) -> list[str]:
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, sign, value = rest.pop(0).partition("=")
        takes_value = known.get(name) is not None
        _check(name, value if sign else rest.pop(0) if takes_value and rest else None, known)
    return rest


def _check(name: str, value: str | None, known: dict[str, Check | None] | dict[str, Check]) -> None:
    if name not in known:
        raise ValueError(f"option {name} is not known")
    check = known[name]
    if check is None and value is not None:
        raise ValueError(f"option {name} takes no value, got {value!r}")
    if check is not None and (value is None or not check(value)):
        raise ValueError(f"option {name} does not take {value!r}")
