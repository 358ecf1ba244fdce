"""Options of `chunkft plan` that concern a machine."""

import argparse
from typing import Any

from chunkft.cli.errors import UserError

__all__ = ["check_fit", "fill_fit"]

OF_A_MACHINE = ("ram", "disk", "tokens", "batch", "link", "tflops", "world", "dtype", "json")


def fill_fit(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--gpu", metavar="SIZE", help="memory of the GPU, such as 24GiB: choose how to train on it")
    add(
        "--ram",
        metavar="SIZE",
        help="host memory for optimizer state and weights (default: as much as is needed)",
    )
    add("--disk", metavar="SIZE", help="room for files of optimizer state (default: none)")
    add("--tokens", type=_positive(int), metavar="N", help="tokens of a sequence (default 1024)")
    add("--batch", type=_positive(int), metavar="N", help="sequences of a forward pass (default 1)")
    add("--link", type=_positive(float), metavar="GB/s", help="between host and GPU, each way (default 25)")
    add(
        "--tflops",
        type=_positive(float),
        metavar="N",
        help="16-bit TFLOP/s that products reach (default 100)",
    )
    add(
        "--world",
        type=_positive(int),
        metavar="N",
        help="processes that train replicas on the machine (default 1)",
    )
    add("--dtype", choices=("bf16", "fp32"), help="of the weights (default bf16)")
    add(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the plan as JSON, without FILE to the terminal",
    )


def check_fit(values: dict[str, Any]) -> None:
    """Raises UserError for options that exclude each other."""
    if "gpu" in values:
        for name in ("partition", "slice_dim", "save", "task"):
            if name in values:
                raise UserError(f"--{name.replace('_', '-')} {values[name]} and --gpu exclude each other")
        return
    for name in OF_A_MACHINE:
        if name in values:
            raise UserError(f"--{name} {values[name]} needs --gpu SIZE")


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; needs a number above 0")
        return value

    return parse
