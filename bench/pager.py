"""The pager beside memcpy, one large copy, plain `tensor.to` paging and torchao's offloading optimizer.

python -m bench.pager                     on the device there is: a GPU, else host threads
python -m bench.pager --dir DIR           the file tier on DIR's disk, too: direct, through the page cache, mapped
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft.cli import machine
from chunkft.streaming import HostArena, Pager

from . import common, disk

MIB = 1 << 20
BETAS, LR, EPS = (0.9, 0.999), 1e-4, 1e-8


class Device:
    """Where slots are, and how to wait for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gpu = name != "cpu"

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def pinned(self, nbytes: int) -> Tensor:
        arena = HostArena(nbytes, pretouch=True)
        if self.gpu:
            arena.page_lock(torch.cuda.current_device())
        return arena.tensor(0, nbytes, torch.uint8)

    def empty(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.name)


def seconds(work: Callable[[], object], device: Device, repeats: int) -> float:
    """Median time of `work` until the device is done, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - start)
    return common.quartiles(times[1:])[1]


def large_copies(device: Device, nbytes: int) -> dict[str, float]:
    """GB/s of one copy of `nbytes` each way, and of two at once on a GPU; on a CPU: memcpy."""
    if device.gpu:
        found = machine.link_bandwidth(torch.cuda.current_device(), nbytes)
    else:
        found = dict.fromkeys(("load", "store"), machine.memcpy_bandwidth(nbytes))
    return {kind: value / 1e9 for kind, value in found.items()}


def pager_copies(device: Device, page: int, pages: int, repeats: int) -> dict[str, float]:
    """GB/s of the pager's own copies: loads alone, stores alone, and both at once."""
    with Pager([page] * pages, device=device.name, slots=3) as pager:
        for index in range(pages):
            pager.acquire(index, load=False).zero_()
            pager.release(index)
        pager.flush()

        def loads() -> None:
            for index in range(pages):
                pager.acquire(index)
                pager.release(index, dirty=False)

        def stores() -> None:
            for index in range(pages):
                pager.acquire(index, load=False)
                pager.release(index)
            pager.flush()

        def both() -> None:
            pager.prefetch(0)
            for index in range(pages):
                pager.acquire(index)
                if index + 1 < pages:
                    pager.prefetch(index + 1)
                pager.release(index)
            pager.flush()

        before = pager.stats()
        total = page * pages
        found = {
            "load": total / seconds(loads, device, repeats) / 1e9,
            "store": total / seconds(stores, device, repeats) / 1e9,
            "both": 2 * total / seconds(both, device, repeats) / 1e9,
        }
        after = pager.stats()
        found["load_alone_on_link"] = rate(after.timed_loaded_bytes, after.load_seconds)
        found["store_alone_on_link"] = rate(after.timed_stored_bytes, after.store_seconds)
        found["new_events"] = after.events_created - before.events_created
        found["new_streams"] = after.streams_created - before.streams_created
    return found


def copy_times(device: Device, page: int, repeats: int) -> dict[str, float]:
    """GB/s of single copies, median and best, memcpy (or one large pinned copy) and the pager's taken in turn."""
    source, target = device.pinned(page), device.empty(page)
    plain: list[float] = []
    with Pager([page] * 2, device=device.name, slots=1, trace_events=8 * (repeats + 1)) as pager:
        for turn in range(repeats + 1):
            device.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            device.synchronize()
            plain.append(time.perf_counter() - start)
            pager.acquire(turn % 2)
            pager.release(turn % 2)
            pager.flush()
    spans = [event for event in pager.trace()["traceEvents"] if event["ph"] == "X"]
    loads, stores = (
        [event["dur"] / 1e6 for event in spans if event["cat"] == kind] for kind in ("load", "store")
    )
    found = {}
    for name, times in (("plain", plain), ("load", loads), ("store", stores)):
        found[name] = page / common.quartiles(times[1:])[1] / 1e9
        # What a busy machine disturbs least.
        found[name + "_best"] = page / min(times[1:]) / 1e9
    return found


def host_time(device: Device, repeats: int) -> dict[str, float]:
    """Microseconds of the calling thread for each call of a visit to a page that is there in time, and for one
    to a page that is on the device already. Between the calls the thread computes, as a trainer does: after a
    sleep the same calls would be charged for cold caches and for a core that has to wake up.
    """
    calls: dict[str, list[float]] = {
        name: [] for name in ("prefetch", "acquire", "release", "visit", "resident")
    }
    clock = time.perf_counter
    with Pager([4096] * 8, device=device.name, slots=3) as pager:
        for turn in range(repeats):
            page = turn % 8
            start = clock()
            pager.prefetch(page)
            prefetched = clock()
            while clock() - prefetched < 2e-4:
                pass
            before = clock()
            pager.acquire(page)
            acquired = clock()
            pager.release(page)
            released = clock()
            parts = prefetched - start, acquired - before, released - acquired
            for name, part in zip(
                ("prefetch", "acquire", "release", "visit"), (*parts, sum(parts)), strict=True
            ):
                calls[name].append(part)
        for _ in range(repeats):
            start = clock()
            pager.prefetch(0)
            pager.acquire(0)
            pager.release(0, keep=True)
            calls["resident"].append(clock() - start)
    return {name: 1e6 * common.quartiles(times)[1] for name, times in calls.items()}


def memory(device: Device) -> dict[str, Any]:
    """Host memory that 32 pages of odd sizes ask for and take, and what torch's pinned allocator would take."""
    sizes = [5_000_003 + 4096 * index for index in range(32)]
    with Pager(sizes, device=device.name) as pager:
        stats = pager.stats()
    torch_takes = sum(1 << (size - 1).bit_length() for size in sizes)
    return {
        "asked_bytes": sum(sizes),
        "taken_bytes": stats.host_capacity,
        "pinned_bytes": stats.pinned_bytes,
        "ratio": stats.host_capacity / sum(sizes),
        "powers_of_two_ratio": torch_takes / sum(sizes),
    }


def rate(nbytes: int, time_taken: float) -> float:
    return nbytes / time_taken / 1e9 if time_taken else 0.0


def adamw(params: Tensor, grads: Tensor, m: Tensor, v: Tensor, step: Tensor) -> None:
    torch._fused_adamw_(
        [params],
        [grads],
        [m],
        [v],
        [],
        [step],
        lr=LR,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=0.0,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


def updates(device: Device, numel: int, pages: int, repeats: int) -> dict[str, float]:
    """Seconds for one AdamW update of pages * numel fp32 parameters whose moments live on the host."""
    params = [torch.randn(numel, device=device.name) for _ in range(pages)]
    grads = [torch.randn(numel, device=device.name) for _ in range(pages)]
    step = torch.ones((), device=device.name)
    found: dict[str, float] = {}

    with Pager([8 * numel] * pages, device=device.name, slots=3) as pager:

        def paged() -> None:
            pager.prefetch(0)
            for index in range(pages):
                m, v = pager.acquire(index).view(torch.float32).chunk(2)
                if index + 1 < pages:
                    pager.prefetch(index + 1)
                adamw(params[index], grads[index], m, v, step)
                pager.release(index)

        found["pager"] = seconds(paged, device, repeats)

    state = [torch.zeros(2 * numel, pin_memory=device.gpu) for _ in range(pages)]

    def plain() -> None:
        for index in range(pages):
            there = state[index].to(device.name, non_blocking=True, copy=True)
            m, v = there.chunk(2)
            adamw(params[index], grads[index], m, v, step)
            state[index].copy_(there, non_blocking=True)

    found["to_non_blocking"] = seconds(plain, device, repeats)

    resident = [torch.zeros(2 * numel, device=device.name) for _ in range(pages)]

    def on_device() -> None:
        for index in range(pages):
            m, v = resident[index].chunk(2)
            adamw(params[index], grads[index], m, v, step)

    found["resident"] = seconds(on_device, device, repeats)
    if device.gpu and importlib.util.find_spec("torchao") is not None:
        from torchao.optim import CPUOffloadOptimizer

        leaves = [torch.nn.Parameter(param) for param in params]
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()
        optimizer = CPUOffloadOptimizer(leaves, torch.optim.AdamW, lr=LR, fused=True)

        def offloaded() -> None:
            for leaf, grad in zip(leaves, grads, strict=True):
                if leaf.grad is None:
                    leaf.grad = grad
            optimizer.step()

        found["torchao_cpu_offload"] = seconds(offloaded, device, repeats)
    return found


def exposed(device: Device, page: int, pages: int, busy_ms: float) -> dict[str, float]:
    """Share of time that the caller's stream waits for loads, with `busy_ms` of matrix products a page."""
    side = torch.randn(*(2 * [4096 if device.gpu else 512]), device=device.name)
    once = seconds(lambda: side @ side, device, 5)
    products = max(1, round(busy_ms / 1e3 / once))
    with Pager([page] * pages, device=device.name, slots=3) as pager:

        def sweep() -> None:
            pager.prefetch(0)
            for index in range(pages):
                pager.acquire(index)
                pager.prefetch((index + 1) % pages)
                for _ in range(products):
                    side @ side
                pager.release(index)

        sweep()
        device.synchronize()
        before = pager.stats()
        start = time.perf_counter()
        sweep()
        device.synchronize()
        taken = time.perf_counter() - start
        after = pager.stats()
    waited = after.exposed_seconds - before.exposed_seconds
    return {"busy_ms": 1e3 * once * products, "page_ms": 1e3 * taken / pages, "exposed_share": waited / taken}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.pager", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mib", type=int, default=64, help="size of a page (default 64)")
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--busy-ms", type=float, default=50.0, help="work between two pages, for the exposed share"
    )
    parser.add_argument("--dir", type=Path, help="measure files in this directory, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = Device(args.device)
    page = args.mib * MIB
    result: dict[str, Any] = common.header(0) | {
        "page_bytes": page,
        "pages": args.pages,
        "repeats": args.repeats,
    }
    out = args.out or common.RESULTS / f"pager-{'gpu' if device.gpu else 'cpu'}.json"

    def kept(name: str, found: dict[str, Any]) -> dict[str, Any]:
        """Adds a section, and writes what is there: a later one may end the process."""
        result[name] = found
        common.write_json(out, result)
        return found

    large = kept("large_copy_gbs", large_copies(device, page * (args.pages if device.gpu else 1)))
    paged = kept("pager_gbs", pager_copies(device, page, args.pages, args.repeats))
    copies = kept("copy_gbs", copy_times(device, page, 2 * args.repeats))
    host = kept("host_us", host_time(device, 2000))
    taken = kept("memory", memory(device))
    update = kept("update_s", updates(device, page // 8, args.pages, args.repeats))
    hidden = kept("exposed", exposed(device, page, args.pages, args.busy_ms))
    kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in large.items())
    print(f"large copy    {kinds} GB/s")
    print(
        f"pager         load {paged['load']:.2f}, store {paged['store']:.2f}, both {paged['both']:.2f} GB/s;"
        f" new events {paged['new_events']}, streams {paged['new_streams']}"
    )
    print(
        f"single copy   load {copies['load']:.2f}, store {copies['store']:.2f} GB/s,"
        f" {copies['load'] / copies['plain']:.3f} and {copies['store'] / copies['plain']:.3f} x plain; best of each"
        f" {copies['load_best'] / copies['plain_best']:.3f} and {copies['store_best'] / copies['plain_best']:.3f} x"
    )
    print(
        f"host time     prefetch {host['prefetch']:.1f} + acquire {host['acquire']:.1f} + release"
        f" {host['release']:.1f} = {host['visit']:.1f} us; page already there {host['resident']:.1f} us"
    )
    print(f"host memory   {taken['ratio']:.4f} x asked (powers of two: {taken['powers_of_two_ratio']:.3f})")
    print("update        " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in update.items()))
    print(f"exposed       {100 * hidden['exposed_share']:.2f} % at {hidden['busy_ms']:.0f} ms of work a page")
    if args.dir is not None:
        result["files_gbs"] = disk.files(args.dir, page * args.pages)
        for name, found in result["files_gbs"].items():
            print(
                f"{name:13s} " + ", ".join(f"{kind} {value:.2f}" for kind, value in found.items()) + " GB/s"
            )
        result["command"] = result["command"].replace(str(args.dir), "DIR")
    common.write_json(out, result)


if __name__ == "__main__":
    main()
