"""What has to work before anything is measured: the machine, its ceilings, every kernel once, a page through the pager.

python -m bench.gpu_smoke machine              names, driver, versions, memory
python -m bench.gpu_smoke ceilings             copies, a matrix product, a launch
python -m bench.gpu_smoke kernel adamw-fp32    one kernel, checked; `--list` names them
python -m bench.gpu_smoke pager                bytes through the pager and back

`--rehearse` runs the same on a CPU: kernels in Triton's interpreter, everything else small.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import common
from .rehearsal import in_interpreter

GIB = 1 << 30


def device_of(rehearse: bool) -> torch.device:
    """The GPU; the CPU in a rehearsal. Raises RuntimeError where torch sees no GPU."""
    if rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --rehearse runs this on the CPU")
    return torch.device("cuda")


def machine(rehearse: bool) -> dict[str, Any]:
    """Names, driver, memory and versions; what a tool prints, or that it is missing."""
    from chunkft.cli import machine as facts

    device = device_of(rehearse)
    found: dict[str, Any] = {"name": common.device_name(), "facts": facts.facts()}
    found["tools"] = {
        name: shutil.which(name)
        for name in ("nvidia-smi", "nvcc", "ncu", "nsys", "compute-sanitizer", "cuobjdump", "git", "c++")
    }
    if found["tools"]["nvidia-smi"]:
        fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,pcie.link.gen.current"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            found["nvidia-smi"] = (done.stdout or done.stderr).strip().splitlines()
        except (
            OSError,
            subprocess.TimeoutExpired,
        ) as error:  # a tool, without which all else can be measured
            found["nvidia-smi"] = [f"{type(error).__name__}: {error}"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["device_memory"] = {"free": free, "total": total}
    return found


def ceilings(rehearse: bool) -> dict[str, Any]:
    """GB/s of copies on the device and over the link, TFLOP/s of a bf16 product, microseconds of a launch."""
    from chunkft.cli.machine import link_bandwidth

    from .clock import Clock

    device = device_of(rehearse)
    clock = Clock(device)
    nbytes = 1 << 20 if rehearse else 4 * GIB
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = clock.microseconds([lambda: target.copy_(source)], 10)[0]
    side = 128 if rehearse else 8192
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = clock.microseconds([lambda: torch.mm(a, b, out=out)], 20)[0]
    one = torch.zeros(1, device=device)
    launches = []
    for _ in range(20):
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            one.add_(1)
        launches.append((time.perf_counter() - start) * 1e4)
        clock.synchronize()
    found: dict[str, Any] = {
        "copy_gb_s": 2 * nbytes / copy / 1e3,
        "bf16_tflops": 2 * side**3 / product / 1e6,
        "launch_us": statistics.median(launches),
    }
    if device.type == "cuda":
        del source, target
        found["link_gb_s"] = {kind: rate / 1e9 for kind, rate in link_bandwidth(0, GIB).items()}
    return found


def pager(rehearse: bool) -> dict[str, Any]:
    """Random bytes through every page and back; raises RuntimeError where one differs."""
    from chunkft.streaming import Pager

    device = device_of(rehearse)
    page, pages = (4096 + 256, 5) if rehearse else ((64 << 20) + 256, 5)
    bytes_of = [torch.randint(0, 255, (page,), dtype=torch.uint8) for _ in range(pages)]
    with Pager([page] * pages, device=device.type, slots=2) as pages_of:
        for index, content in enumerate(bytes_of):
            pages_of.acquire(index, load=False).copy_(content)
            pages_of.release(index)
        for index in (3, 0, 4, 1, 2):
            if not torch.equal(pages_of.acquire(index).cpu(), bytes_of[index]):
                raise RuntimeError(f"page {index} came back with other bytes")
            pages_of.release(index, dirty=False)
        pages_of.flush()
        stats = pages_of.stats()
    return {"pages": pages, "page_bytes": page, "loads": stats.loads, "pinned_bytes": stats.pinned_bytes}


def training(rehearse: bool) -> dict[str, Any]:
    """A few steps with paged state against the same with state on the device; raises RuntimeError where bits differ."""
    import chunkft

    from . import plain_llama

    device = device_of(rehearse)
    dtype = torch.bfloat16
    ends = []
    plan = None
    for place in ("device", "paged"):
        model = plain_llama.build("tiny", device, dtype)
        chosen = {"chunks": 4} if plan is None else {"chunks": None, "partition": plan}
        optimizer = chunkft.ChunkAdamW(model, lr=1e-3, interval=2, state_device=place, **chosen)
        plan = optimizer.plan
        for step in range(12):
            model(plain_llama.batch_of("tiny", device, 2, 32, seed=step)).backward()
            optimizer.step()
        optimizer.detach()
        ends.append([weight.detach().clone() for weight in model.parameters()])
    differing = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    if differing:
        raise RuntimeError(
            f"{differing} of {len(ends[0])} weights differ between state on the device and paged"
        )
    return {"steps": 12, "weights": len(ends[0])}


def kernel(name: str, rehearse: bool) -> dict[str, Any]:
    """One call of a kernel, compiled, checked and timed from the host; raises RuntimeError where it is not right."""
    from .kernel_calls import CALLS

    if name == "all":
        return {one: kernel(one, rehearse) for one in CALLS}
    if name not in CALLS:
        raise ValueError(f"kernel {name!r} does not exist; allowed are all, {', '.join(CALLS)}")
    device = device_of(rehearse)
    torch.manual_seed(0)
    start = time.perf_counter()
    check = CALLS[name](device, rehearse)
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    off, allowed = check()
    if not off <= allowed:  # a NaN is not allowed either
        raise RuntimeError(f"{name} is off by {off:.3g}, allowed {allowed:.3g}")
    return {"first_call_s": round(first, 3), "off": off, "allowed": allowed}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "machine": machine,
    "ceilings": ceilings,
    "pager": pager,
    "training": training,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu_smoke", description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=[*PARTS, "kernel"])
    parser.add_argument("kernel", nargs="?", help="which kernel, or all, for the part of that name")
    parser.add_argument("--list", action="store_true", help="name the kernels and stop")
    parser.add_argument("--rehearse", action="store_true", help="small and on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    if args.rehearse:
        in_interpreter("gpu_smoke", arguments)
    if args.list:
        from .kernel_calls import CALLS

        print("\n".join(CALLS))
        return
    if args.part is None or (args.part == "kernel") != (args.kernel is not None):
        parser.error("needs a part, and a kernel's name for the part 'kernel'")
    name = args.part if args.kernel is None else args.kernel
    if args.part == "kernel":
        found = kernel(name, args.rehearse)
    else:
        found = PARTS[name](args.rehearse)
    if args.out is not None:
        common.write_json(args.out, common.header(0) | {"found": found})
    print(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in found.items() if key != "facts"))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    return str(value)


if __name__ == "__main__":
    main()
