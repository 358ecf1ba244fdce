"""The `chunkft` command: parses the arguments, runs a subcommand, and turns mistakes into one line."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from chunkft.cli.arguments import parse
from chunkft.cli.errors import PeerError, UserError

__all__ = ["UserError", "main"]

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
WAIT_FOR_FIRST = 5.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `chunkft` with the arguments `argv` (default: those of the process) and returns its exit status.

    0: done. 1: the run failed. 2: the input is wrong, told in one line on stderr. 130 or 143: stopped by a
    signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        command = parse(arguments)
    except UserError as error:
        if _rank() and os.environ.get("RANK", "0") != "0":
            return _leave_it_to_first()
        return _report(str(error), USAGE_ERROR, debug)
    try:
        if command.name == "plan":
            if command.plan is not None and command.plan.gpu is not None:
                from chunkft.cli.fit import show_fit

                return show_fit(command.plan, command.given)
            from chunkft.cli.plan import show_plan

            return show_plan(command.plan)
        if command.name == "doctor":
            from chunkft.cli.doctor import show_doctor

            return show_doctor(command.doctor)
        if command.name == "bench":
            from chunkft.cli.bench import run_bench

            return run_bench(command.bench)
        if command.name == "profile":
            from chunkft.cli.profile import show_profile

            return show_profile(command.profile, given=command.given)
        from chunkft.cli.run import finetune

        return finetune(command.finetune, given=command.given, resume=command.resume)
    except UserError as error:
        return _report(str(error), USAGE_ERROR, debug)
    except PeerError as error:
        status = USAGE_ERROR if error.usage else FAILURE
        return status if error.silent else _report(f"{_rank()}{error}", status, debug)
    except KeyboardInterrupt:
        return _report("stopped", INTERRUPTED, debug)
    except BrokenPipeError:
        return FAILURE
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not missing.startswith("chunkft"):
            return _report(f"this needs the package {missing}, which is not installed", FAILURE, debug)
        rank = _rank()
        hint = "" if debug or rank else " (--debug shows where)"
        return _report(
            f"{rank}{type(error).__name__}: {_first_line(error)}{hint}", FAILURE, debug or bool(rank)
        )


def _rank() -> str:
    """Which process speaks, where torchrun started several."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ
    return "" if alone else f"rank {os.environ.get('RANK', '?')}: "


def _leave_it_to_first() -> int:
    """Let rank 0 tell a mistake that all ranks have: torchrun ends it, unheard, once another rank has ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        time.sleep(WAIT_FOR_FIRST)
    return USAGE_ERROR


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _report(message: str, status: int, debug: bool) -> int:
    if debug:
        # in one piece, so that those of several processes do not mix
        print(f"{_rank()}{traceback.format_exc()}", end="", file=sys.stderr, flush=True)
    print(f"chunkft: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status
