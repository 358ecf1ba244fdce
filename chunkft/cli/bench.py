"""`chunkft bench`: finds the benchmarks and runs one of them, or the quick round."""

import argparse
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chunkft
from chunkft.cli.errors import UserError

__all__ = ["PARTS", "BenchSettings", "bench_parser", "bench_settings", "run_bench"]

# Subcommand: module of the benchmarks, and what it does.
PARTS = {
    "kernels": ("kernels", "kernels against cuBLAS; without a GPU what the picker's model predicts"),
    "pager": ("pager", "paging against large copies"),
    "step": ("step", "step time of full AdamW, BAdam and chunkft, interleaved"),
    "memory": ("memory", "bytes that training holds"),
    "quality": ("quality", "accuracy after real fine-tuning"),
    "peers": ("peer_bench", "other methods side by side: peak memory, step time, loss"),
    "scaling": ("scaling", "step time and memory over K, T and tokens, beside the theory"),
    "compare": ("compare", "two result files, or a git revision, for regressions beyond noise"),
    "report": ("html_report", "every result on one page"),
}
INSTALLED = "chunkft_bench"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What `chunkft bench` was told: a part with its own arguments, or None for the quick round."""

    part: str | None = None
    arguments: tuple[str, ...] = ()
    out: str | None = None


def bench_parser(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` the options of `chunkft bench`."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a short round of step, memory, pager, kernels and peers")
    add("--out", metavar="DIR", help="where the results of --quick go")
    add("--debug", action="store_true", help="show the traceback of an error")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=False)
    for name, (_, text) in PARTS.items():
        # Everything after the name is for the benchmark, whose own parser knows it: nothing starts an option here.
        part = parts.add_parser(
            name, help=f"{text} ({name} --help)", add_help=False, prefix_chars="\0", allow_abbrev=False
        )
        part.add_argument("arguments", nargs="*")


def bench_settings(values: dict[str, Any]) -> BenchSettings:
    """Settings from parsed options; raises UserError unless they name either a part or --quick."""
    part, quick = values.get("part"), values.get("quick", False)
    if (part is None) != quick:
        raise UserError(f"chunkft bench needs one of --quick, {', '.join(PARTS)} (see chunkft bench --help)")
    if part is not None and "out" in values:
        raise UserError(f"--out {values['out']} before {part} belongs to --quick: give it after {part}")
    return BenchSettings(part=part, arguments=tuple(values.get("arguments", ())), out=values.get("out"))


def run_bench(settings: BenchSettings) -> int:
    """Runs a benchmark in this process and returns its exit status; raises UserError where there is none."""
    package = _package()
    if settings.part is None:
        name, arguments = "quick", [] if settings.out is None else ["--out", settings.out]
    else:
        name, arguments = PARTS[settings.part][0], list(settings.arguments)
    main = importlib.import_module(f"{package}.{name}").main
    return int(main(arguments) or 0)


def _package() -> str:
    """Name of the benchmarks' package: that of the checkout which chunkft comes from, so that both are of one commit,
    else the installed one.
    """
    root = Path(chunkft.__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / "bench" / "common.py").is_file():
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        return "bench"
    if importlib.util.find_spec(INSTALLED) is not None:
        return INSTALLED
    raise UserError(
        f"the benchmarks are not there: neither {root / 'bench'} nor the package {INSTALLED} exists;"
        " install chunkft anew, or run this from a checkout"
    )
