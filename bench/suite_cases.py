"""The cases of `bench.gpu_suite`, in the order of their value, each with what a rehearsal on a CPU runs instead."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .suite_run import Case

SLOTS = {
    "a": "contact: machine, ceilings, build, every kernel once, a page",
    "b": "correctness: kernels against fp64, paging against bytes, training bit by bit",
    "c": "kernels against cuBLAS and against a copy",
    "d": "the paper's case: Llama-2-7B, bf16, 1,024 tokens",
    "e": "streamed weights: Llama-2-7B in a few GiB, against resident ones and without copies",
    "f": "other methods side by side",
    "g": "tuning of the shapes that are furthest behind, and compute-sanitizer",
}

# On the CPU even where there is a GPU: a rehearsal spends none of its time.
CPU = {"CUDA_VISIBLE_DEVICES": ""}
WORKERS = 8
MEASURED = ("llama-2-7b", "llama-3-8b", "qwen3-8b")
DENSE = ("slice", "group", "accumulate", "misaligned", "blocks")
SEVEN = (
    *("-m", "bench.residency", "--model", "llama-2-7b", "--checkpointing", "--batch", "1"),
    *("--tokens", "1024", "--chunks", "32", "--interval", "4"),
)
# (timed, untimed): a whole sweep to fill the pages, and a whole one that is timed
SWEEPS = (128, 128)
# Where all steps are alike fewer do; with K=1 each moves the state of all parameters over the link, both ways.
# The leanest place has 128 chunks: a whole sweep, for the peak of the largest, is 512 steps.
ALIKE = {"adamw": (24, 8), "backward K=1": (8, 4), "lean": (512, 8)}
SEVEN_SMALL = (
    *("-m", "bench.residency", "--model", "tiny", "--checkpointing", "--batch", "1", "--tokens", "8"),
    *("--chunks", "2", "--interval", "1", "--steps", "2", "--warmup", "2", "--page-mib", "1"),
)
# Without what has to be installed or compiled first; one step a sample, as each is long.
PEERS = ("AdamW", "chunkft", "BAdam", "GaLore", "LoRA", "8-bit")


def kernel_calls() -> list[str]:
    """Names in `bench.kernel_calls`, read and not imported: the suite starts before the package is built."""
    source = Path(__file__).with_name("kernel_calls.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CALLS":
            assert isinstance(node.value, ast.Dict)
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    raise ValueError("kernel_calls.py has no dictionary CALLS")


def all_cases() -> list[Case]:
    """Every case of the suite, names unique, neighbours of a slot together."""
    return [*_contact(), *_correctness(), *_kernels(), *_paper(), *_streamed(), *_peers(), *_tuning()]


def _case(
    name: str,
    slot: str,
    what: str,
    command: tuple[str, ...],
    rehearsal: tuple[str, ...],
    expect: float,
    limit: float,
    *,
    together: bool = False,
    restarts: int = 0,
    needs: str | None = None,
) -> Case:
    return Case(name, slot, what, command, rehearsal, expect, limit, together, restarts, needs, CPU)


def _smoke(name: str, what: str, expect: float, limit: float, *words: str, together: bool = False) -> Case:
    command = ("-m", "bench.gpu_smoke", *words, "--out", "{out}")
    needs = None if name == "contact/machine" else "contact/build"
    return _case(
        name, "a", what, command, (*command, "--rehearse"), expect, limit, together=together, needs=needs
    )


def _contact() -> Iterator[Case]:
    build = ("-m", "bench.suite_build")
    # a rehearsal leaves the installed package alone
    rehearsal = ("-c", "import chunkft.streaming as s; print(s.memory_budget())")
    yield _case("contact/build", "a", "the package with its native core", build, rehearsal, 30, 150)
    yield _smoke("contact/machine", "names, driver, versions, memory", 8, 40, "machine")
    yield _smoke("contact/ceilings", "copies, a matrix product, a launch", 12, 60, "ceilings")
    for number, name in enumerate(kernel_calls()):
        case = _smoke(f"contact/{name}", "one call, checked", 10, 60, "kernel", name, together=True)
        every = ("-m", "bench.gpu_smoke", "kernel", "all", "--out", "{out}", "--rehearse")
        yield replace(case, rehearsal=every if number == 0 else ())
    yield _smoke("contact/pager", "bytes through pages and back", 8, 60, "pager", together=True)
    yield _smoke("contact/training", "steps with paged state, bit by bit", 12, 90, "training", together=True)


def _correctness() -> Iterator[Case]:
    kernels, gpu = ("tests/kernels/numeric",), ("tests/gpu", "--marks", "not slow")
    suites = {
        "kernels": (kernels, "every kernel against fp64, natively", 60.0),
        "gpu": (gpu, "streams, graphs, paging, training, memory", 75.0),
    }
    for name, (words, what, expect) in suites.items():
        command = ("-m", "bench.suite_tests", *words, "--workers", str(WORKERS), "--out", "{out}")
        yield _case(
            f"correct/{name}", "b", what, command, (*command, "--collect-only"), expect, 3 * expect,
            needs="contact/build",
        )  # fmt: skip


def _kernels() -> Iterator[Case]:
    kernels = ("-m", "bench.kernels")
    sizes = ("--chunks", "1", "32", "--tokens", "1024", "4096")
    small = ("--rehearse", "--rounds", "1", "--tune", "1")
    # compiling is most of the time of a first run, and needs no turn on the GPU of its own
    for share in range(WORKERS):
        words = (*kernels, "--models", *MEASURED, "--forms", *DENSE, *sizes, "--compile-only")
        few = (*kernels, "--models", MEASURED[0], "--forms", "slice", "--chunks", "32", "--tokens", "1024")
        rehearsal = (*few, *small, "--compile-only", "--share", "0/2") if share == 0 else ()
        yield _case(
            f"kernels/compile-{share}", "c", "fills Triton's cache", (*words, "--share", f"{share}/{WORKERS}"),
            rehearsal, 40, 120, together=True, needs="contact/build",
        )  # fmt: skip
    for model in MEASURED:
        words = (*kernels, "--models", model, "--forms", *DENSE, *sizes, "--out", "{out}")
        few = (
            *kernels,
            "--models",
            model,
            "--chunks",
            "32",
            "--tokens",
            "1024",
            "--forms",
            "group",
            "accumulate",
        )
        yield _case(
            f"kernels/{model}", "c", "weight gradients against cuBLAS", words,
            (*few, *small, "--out", "{out}") if model == MEASURED[0] else (), 45, 150, restarts=3,
            needs="contact/build",
        )  # fmt: skip
        if model == MEASURED[0]:
            updates = ("-m", "bench.kernel_updates", "--out", "{out}")
            yield _case(
                "kernels/updates", "c", "AdamW and embedding rows against a copy", updates,
                (*updates, "--rehearse"), 30, 90, restarts=3, needs="contact/build",
            )  # fmt: skip
    experts = (
        *kernels,
        "--models",
        "qwen3-30b-a3b",
        "--forms",
        "experts",
        "--tokens",
        "4096",
        "--out",
        "{out}",
    )
    yield _case(
        "kernels/experts", "c", "experts against PyTorch's grouped product", (*experts, "--chunks", "1", "8"),
        (*experts, "--chunks", "8", *small), 20, 90, restarts=2, needs="contact/build",
    )  # fmt: skip
    pager = ("-m", "bench.pager", "--out", "{out}")
    tiny = ("--mib", "1", "--pages", "2", "--repeats", "2", "--busy-ms", "1", "--device", "cpu")
    yield _case(
        "kernels/pager", "c", "paging against the link", pager, (*pager, *tiny), 25, 90, needs="contact/build"
    )


def _paper() -> Iterator[Case]:
    # seconds: pinning the state of 7B parameters is most of those with paged state
    places = {
        "paged": 110.0,
        "adamw": 45.0,
        "device": 45.0,
        "lean": 110.0,
        "stream": 110.0,
        "backward K=1": 120.0,
    }
    for place, expect in places.items():
        steps, warmup = map(str, ALIKE.get(place, SWEEPS))
        yield _case(
            f"paper/{place.replace(' ', '-')}", "d", f"Llama-2-7B, state: {place}",
            (*SEVEN, "--steps", steps, "--warmup", warmup, "--only", place, "--out", "{out}"),
            (*SEVEN_SMALL, "--only", *places, "--out", "{out}") if place == "paged" else (),
            expect, 2.5 * expect, needs="contact/build",
        )  # fmt: skip


def _streamed() -> Iterator[Case]:
    words = ("-m", "bench.streamed", "--out", "{out}")
    small = ("--model", "tiny", "--tokens", "8", "--positions", "2", "--rounds", "2")
    # seconds: each model is filled and page-locked, then 4 positions of 6 rounds
    lengths = {1024: 90.0, 4096: 130.0}
    for tokens, expect in lengths.items():
        yield _case(
            f"streamed/{tokens}", "e", f"Llama-2-7B, weights streamed, {tokens:,} tokens",
            (*words, "--model", "llama-2-7b", "--tokens", str(tokens)),
            (*words, *small) if tokens == 1024 else (), expect, 2.5 * expect, restarts=1, needs="contact/build",
        )  # fmt: skip
    yield _case(
        "streamed/resident", "e", "the same, 8 and 16 blocks resident",
        (*words, "--model", "llama-2-7b", "--tokens", "1024", "--resident", "8", "16", "--places", "resident", "host"),
        (), 110, 275, restarts=1, needs="contact/build",
    )  # fmt: skip


def _peers() -> Iterator[Case]:
    words = ("-m", "bench.peer_bench", "--out", "{out}")
    real = ("--only", *PEERS, "--steps", "16", "--rounds", "3", "--per-sample", "4", "--limit", "30")
    tiny = (
        *(
            "--only",
            "AdamW",
            "chunkft backward",
            "--model",
            "tiny",
            "--batch",
            "2",
            "--tokens",
            "16",
            "--steps",
            "10",
        ),
        *("--rates", "3e-3", "--rounds", "2", "--per-sample", "4"),
    )
    yield _case(
        "peers/1b", "f", "1B parameters: memory, step time, loss", (*words, *real), (*words, *tiny), 100, 200,
        needs="contact/build",
    )  # fmt: skip


def _tuning() -> Iterator[Case]:
    words = ("-m", "bench.kernels", "--chunks", "1", "32", "--tokens", "1024", "4096", "--out", "{out}")
    real = ("--worst", "8", "--suite", "{suite}", "--tune", "12")
    small = ("--worst", "1", "--suite", "{suite}", "--tune", "2", "--rehearse", "--rounds", "1")
    yield _case(
        "tuning/worst", "g", "twelve tiles for each of the worst shapes", (*words, *real), (*words, *small),
        90, 240, restarts=3, needs="contact/build",
    )  # fmt: skip
    sanitized = ("tests/gpu", "--marks", "slow", "--workers", "3", "--out", "{out}")
    yield _case(
        "tuning/sanitizer", "g", "every kernel under compute-sanitizer", ("-m", "bench.suite_tests", *sanitized),
        (), 120, 300, needs="contact/build",
    )  # fmt: skip
