"""Compiles kernels ahead of time for GPUs that are not here, and reads what the compiler made of them.

    report = compile_for(kernel, {"x": "*bf16", "n": "i32", "eps": "fp32"}, {"BLOCK": 1024}, sm=90)
    check(report)                     # no spills, shared memory within the target's limit
    assert report.has("wgmma")        # an instruction, in the PTX

Triton's own cache, below build/, makes a second run quick: it is keyed by the source of the kernel and of the
functions that it calls, by every argument and by the version of Triton.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chunkft.kernels.targets import shared_memory_limit

TARGETS = (80, 86, 89, 90, 100, 120)
CACHE = Path(__file__).parents[2] / "build" / "aot"
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
NEWEST = VERSION >= (3, 9)
# The ptxas of Triton 3.6 keeps a few words of these on the stack: bytes a thread by kernel and target, at most.
STACK = (
    {}
    if VERSION != (3, 6)
    else {
        ("wgrad_kernel", 100): 24,
        ("wgrad_kernel", 120): 8,
        ("wgrad_persistent_kernel", 120): 8,
        ("grouped_kernel", 100): 8,
        ("adamw_kernel", 120): 8,
    }
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What one compilation gave: registers a thread, bytes spilled a thread, bytes of shared memory a block."""

    kernel: str
    sm: int
    registers: int
    spills: int
    shared: int
    num_warps: int
    num_stages: int
    constexprs: dict
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    def has(self, instruction: str) -> bool:
        """Whether the PTX holds an instruction that starts with this."""
        return re.search(rf"^\s*(@%p\d+ )?{re.escape(instruction)}", self.ptx, re.MULTILINE) is not None

    def sass(self) -> str:
        """The machine code as text."""
        return _tool("nvdisasm", self.cubin, "-c")


def compile_for(
    kernel: triton.JITFunction,
    signature: dict[str, str | tuple[str, ...]],
    constexprs: dict,
    sm: int,
    num_warps: int = 4,
    num_stages: int = 3,
    unaligned: Collection[str] = (),
) -> Report:
    """Compiles a kernel for compute capability `sm` (90 is 9.0).

    `signature` gives the type of every argument that is not a constexpr. Pointers and integers are declared divisible
    by 16, as the launcher finds them at run time for aligned tensors, except for the names in `unaligned`.
    """
    unknown = (set(signature) | set(constexprs) | set(unaligned)) ^ (set(kernel.arg_names) | set(unaligned))
    assert not unknown, f"{kernel.__name__}: arguments {sorted(unknown)} are missing or too many"
    full = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    divisible = {}
    for place, (name, kind) in enumerate(full.items()):
        # a tuple of arguments is one argument, whose parts have a path of their own
        parts = {(place, i): k for i, k in enumerate(kind)} if isinstance(kind, tuple) else {(place,): kind}
        for path, part in parts.items():
            if name not in unaligned and (part.startswith("*") or part in ("i32", "i64")):
                divisible[path] = [["tt.divisibility", 16]]
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    source = ASTSource(kernel, full, constexprs=constexprs, attrs=divisible)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    report = Report(
        kernel.__name__,
        sm,
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        num_warps,
        num_stages,
        {name: str(value) for name, value in constexprs.items()},
        compiled.asm["ptx"],
        compiled.asm["cubin"],
    )
    _note(report)
    return report


def check(report: Report) -> None:
    """Fails where a kernel spills or asks for more shared memory than a block of its target can have."""
    limit = shared_memory_limit(report.sm)
    assert report.spills <= STACK.get((report.kernel, report.sm), 0), (
        f"{report} spills {report.spills} bytes a thread"
    )
    assert report.shared <= limit, (
        f"{report} needs {report.shared} bytes of shared memory, the limit is {limit}"
    )


def table() -> str:
    """Registers, spills and shared memory of everything that was compiled since the last `make clean`, as Markdown."""
    rows = [json.loads(path.read_text()) for path in sorted((CACHE / "reports").glob("*.json"))]
    rows = [row for row in rows if "triton" in row]  # not those that an older version of this file wrote
    rows.sort(key=lambda row: (row["kernel"], row["sm"], row["setting"]))
    lines = [
        "| kernel | sm | triton | setting | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            "| {kernel} | {sm} | {triton} | {setting} | {registers} | {spills} | {shared} |".format(**row)
        )
    return "\n".join(lines) + "\n"


def write_table() -> Path | None:
    """Writes `table()` beside the reports; None if nothing was compiled."""
    if not (CACHE / "reports").is_dir():
        return None
    path = CACHE / "table.md"
    path.write_text(table())
    return path


def _note(report: Report) -> None:
    kept = {k: v for k, v in report.constexprs.items() if v not in ("False", "None")}
    setting = ", ".join([*(f"{k}={v}" for k, v in kept.items()), f"warps={report.num_warps}"])
    setting += f", stages={report.num_stages}"
    row = {
        "kernel": report.kernel,
        "sm": report.sm,
        "triton": triton.__version__,
        "setting": setting,
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared,
    }
    name = hashlib.sha256(f"{report.kernel}{report.sm}{setting}{triton.__version__}".encode()).hexdigest()[
        :16
    ]
    (CACHE / "reports").mkdir(parents=True, exist_ok=True)
    part = CACHE / "reports" / f"{name}.{os.getpid()}"
    part.write_text(json.dumps(row))
    part.replace(part.with_suffix(".json"))


def _tool(name: str, cubin: bytes, *options: str) -> str:
    beside = CACHE / f"{os.getpid()}.cubin"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(cubin)
    try:
        done = subprocess.run([TOOLS / name, *options, beside], capture_output=True, text=True, check=True)
    finally:
        beside.unlink()
    return done.stdout


if __name__ == "__main__":
    print(table(), end="")
