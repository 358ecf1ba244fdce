"""Options of the commands: names, and what their values may be."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import chunkft
from chunkft.cli.bench import bench_parser, bench_settings
from chunkft.cli.errors import UserError
from chunkft.cli.fit_arguments import check_fit, fill_fit
from chunkft.cli.settings import Command, DoctorSettings, FinetuneSettings, PlanSettings, ProfileSettings

__all__ = ["parse"]

TASKS = ("causal-lm", "sequence-classification")
PARTITIONS = ("bytes", "layers", "interleaved")
SCHEDULES = ("cyclic", "reverse", "random")
DTYPES = ("auto", "fp32", "bf16")
LR_SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("chunkadamw", "adamw")
RESIDENCIES = ("chunk", "stream")
UPDATES = ("step", "backward")
WEIGHTS = ("resident", "stream")
UPDATE_PLACES = ("auto", "host", "device")
STATE_BITS = (8, 32)
MAX_SEED = 2**32 - 1  # of numpy, which transformers seeds


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bound = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
        return value

    return convert


def _number(*, least: float = 0.0, above: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            bound = f"above {least:g}" if above else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bound}")
        return value

    return convert


def _device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdigit()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", choices=TASKS, help="what is learned: causal-lm (default) or sequence-classification")
    add(
        "--chunks",
        type=_integer(1),
        metavar="K",
        help="chunks of the parameters, one active at a time (default 16)",
    )
    add("--partition", choices=PARTITIONS, help="how parameters become chunks (default bytes)")
    add("--slice-dim", type=int, choices=(0, 1), help="slice rows (0, default) or columns (1) of a weight")
    add(
        "--always-active",
        metavar="PATTERNS",
        help="parameters that train at every step: head, none, or name patterns separated by commas"
        " (default: head for classification, else none)",
    )


def _training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR|ID",
        help="model directory or hub id; without any argument: the embedded model",
    )
    add("--data", metavar="FILE", help="training data: .jsonl, or .tsv/.csv for classification")
    _add_plan_options(parser)
    add(
        "--interval",
        type=_integer(1),
        metavar="T",
        help="steps before the next chunk (default: at least 8 sweeps fit)",
    )
    add("--schedule", choices=SCHEDULES, help="order of the chunks (default cyclic)")
    add(
        "--residency",
        choices=RESIDENCIES,
        help="optimizer state of the active chunk on the device: all of it (chunk, default), or a few pages that it"
        " passes through in every step (stream)",
    )
    add(
        "--update",
        choices=UPDATES,
        help="parameters in the optimizer step (step, default), or as soon as their gradient is complete (backward;"
        " needs --residency stream)",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        help="on the device (resident, default), or in host memory, from where each block comes to the device when it"
        " computes (stream): for models larger than the GPU",
    )
    add(
        "--update-on",
        choices=UPDATE_PLACES,
        help="where weights that stream are updated: host, device, or auto (default)",
    )
    add(
        "--resident-blocks",
        type=_integer(0),
        metavar="N",
        help="blocks of --weights stream that stay on the device (default 0)",
    )
    add(
        "--weights-dir",
        metavar="DIR",
        help="keep weights that stream in a file of DIR instead of host memory",
    )
    add(
        "--offload-inputs",
        action="store_true",
        help="recompute the blocks of --weights stream in the backward pass, from inputs kept in host memory",
    )
    add("--page-mib", type=_integer(1), metavar="MIB", help="page size of --residency stream (default 64)")
    add("--state-dir", metavar="DIR", help="keep the optimizer state in files of DIR instead of host memory")
    add(
        "--state-bits",
        type=int,
        choices=STATE_BITS,
        help="bits of each of the two moments of an element: 32 (default), or 8, with a scale for every 128",
    )
    add(
        "--optimizer", choices=OPTIMIZERS, help="chunkadamw (default), or adamw: all parameters at every step"
    )
    add("--lr", type=_number(above=True), help="peak learning rate (default 1e-4)")
    add("--weight-decay", type=_number(), help="on weights of two or more dimensions (default 0)")
    add(
        "--max-grad-norm",
        type=_number(),
        help="clip the norm of the active gradients; 0: never (default 1; 0 with --update backward)",
    )
    add(
        "--batch-size",
        type=_integer(1),
        help="sequences of a forward pass of one process (default 8); under torchrun a step learns from processes x"
        " batch-size x grad-accum",
    )
    add("--grad-accum", type=_integer(1), help="forward passes per optimizer step (default 1)")
    add("--seq-len", type=_integer(8), help="longest sequence in tokens; longer data is cut (default 512)")
    add(
        "--resize-embeddings",
        action="store_true",
        help="add rows to the model's embeddings where its tokenizer has more tokens",
    )
    add("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights: fp32, bf16, or auto: bf16 if the model is 16-bit and on a GPU",
    )
    add("--device", type=_device, help="auto (default), cpu, cuda or cuda:N")
    add("--seed", type=_integer(0, MAX_SEED), help="of data order, chunk order and dropout (default 0)")
    add("--text-column", metavar="COLUMN", help="of tsv/csv data: name, or number from 1")
    add("--label-column", metavar="COLUMN", help="of tsv/csv data: name, or number from 1")
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", help="show the traceback of an error")


def _finetune_parser(parser: argparse.ArgumentParser) -> None:
    _training_options(parser)
    add = parser.add_argument
    add("--lr-schedule", choices=LR_SCHEDULES, help="over the whole run (default cosine)")
    add("--warmup", type=_integer(0), metavar="STEPS", help="steps of linear warm-up (default 0)")
    add("--epochs", type=_number(above=True), help="passes over the data (default 1)")
    add("--steps", type=_integer(1), help="optimizer steps, instead of --epochs")
    add("--eval-data", metavar="FILE", help="held-out data in the form of --data")
    add(
        "--eval-every",
        type=_integer(1),
        metavar="STEPS",
        help="evaluate so often (default: before and after)",
    )
    add("--save-every", type=_integer(1), metavar="STEPS", help="write a checkpoint so often (default 500)")
    add(
        "--fsdp",
        action="store_true",
        help="under torchrun: shard the weights over the processes (FSDP2), in place of a replica on each",
    )
    add(
        "--dist-timeout",
        type=_integer(1),
        metavar="SECONDS",
        help="under torchrun: how long a process waits for another before it ends with an error (default 600)",
    )
    add("--out", metavar="DIR", help="where the model and the reports go (default runs/NAME-N)")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of --out, with the options it was run with",
    )


def _profile_parser(parser: argparse.ArgumentParser) -> None:
    _training_options(parser)
    add = parser.add_argument
    add(
        "--steps",
        type=_integer(1),
        help="optimizer steps that are timed, and as many whose memory is counted (default 3)",
    )
    add("--warmup", type=_integer(0), metavar="STEPS", help="optimizer steps before them (default 1)")
    add("--out", metavar="DIR", help="where trace, picture and figures go (default profiles/NAME-N)")
    add(
        "--nsight",
        action="store_true",
        help="leave timing to nsys or ncu, under which this runs: NVTX ranges, and cudaProfilerStart around the steps",
    )


def _plan_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|ID|SIZE",
        help="model directory or hub id (only its config is read), or with --gpu one of 1B, 3B, 8B, 14B, 32B, 70B",
    )
    _add_plan_options(parser)
    fill_fit(parser)
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _doctor_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dir", metavar="DIR", help="measure the disk that DIR is on, too (for --state-dir)")
    add(
        "--mib",
        type=_integer(1),
        metavar="N",
        help="size of the copies that are measured, in MiB (default 256)",
    )
    add("--json", metavar="FILE", help="write the findings as JSON, bandwidths in bytes per second")
    add("--debug", action="store_true", help="show the traceback of an error")


def _build() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="chunkft",
        description="Full fine-tuning in chunks: all weights are trained, one chunk at a time.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.add_argument("--version", action="version", version=f"chunkft {chunkft.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text, fill in (
        ("finetune", "fine-tune a model", _finetune_parser),
        ("profile", "show where the time and the memory of a few training steps go", _profile_parser),
        ("plan", "show how a model's parameters become chunks, without training", _plan_parser),
        ("doctor", "show and measure what this machine gives to paging", _doctor_parser),
        (
            "bench",
            "measure kernels, paging, step time, memory and other methods on this machine",
            bench_parser,
        ),
    ):
        sub = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        fill(sub)
    return parser


def _check_backward(values: dict[str, Any]) -> None:
    if values.get("residency") != "stream":
        raise UserError("--update backward needs --residency stream")
    if values.get("max_grad_norm"):
        raise UserError(
            f"--max-grad-norm {values['max_grad_norm']:g} and --update backward exclude each other: the norm is known"
            " only when all gradients are there"
        )
    if values.get("grad_accum", 1) > 1:
        raise UserError(
            f"--grad-accum {values['grad_accum']} and --update backward exclude each other: a slice is updated as soon"
            " as its gradient is complete"
        )


def _check(values: dict[str, Any]) -> None:
    if "epochs" in values and "steps" in values:
        raise UserError(
            f"--epochs {values['epochs']:g} and --steps {values['steps']} exclude each other: give"
            f" one of them"
        )
    if values.get("optimizer") == "adamw":
        for name in ("residency", "update", "page_mib", "state_dir", "state_bits", "weights"):
            if name in values:
                raise UserError(f"--{name.replace('_', '-')} {values[name]} needs --optimizer chunkadamw")
    if values.get("update") == "backward":
        _check_backward(values)
    if "fsdp" in values and values.get("weights") == "stream":
        raise UserError("--fsdp and --weights stream exclude each other: choose where weights are kept")
    if values.get("weights") != "stream":
        for name in ("update_on", "resident_blocks", "weights_dir", "offload_inputs"):
            if name in values:
                raise UserError(f"--{name.replace('_', '-')} needs --weights stream")
    elif "resize_embeddings" in values:
        raise UserError(
            "--resize-embeddings and --weights stream exclude each other: resize the model once with --weights resident"
        )
    elif "offload_inputs" in values and "gradient_checkpointing" in values:
        raise UserError(
            "--offload-inputs recomputes the blocks by itself: leave --gradient-checkpointing out"
        )
    if "page_mib" in values and values.get("residency") != "stream":
        raise UserError(f"--page-mib {values['page_mib']} needs --residency stream")
    if values.get("always_active") == "":
        raise UserError(
            "--always-active '' is empty: allowed are head, none, or name patterns separated by commas"
        )
    if values.get("resume"):
        if "out" not in values:
            raise UserError("--resume needs --out DIR, the directory of the run to go on with")
        return
    if "fsdp" in values and "model" not in values:
        raise UserError(
            "--fsdp needs --model DIR|ID and --data FILE; the embedded model is trained as replicas"
        )
    if "model" not in values and "data" in values:
        raise UserError(
            f"--data {values['data']} needs --model DIR|ID (without both, the embedded model and task run)"
        )
    if "model" in values and "data" not in values:
        raise UserError(
            f"--model {values['model']} needs --data FILE (without both, the embedded model and task run)"
        )
    if "resize_embeddings" in values and "model" not in values:
        raise UserError("--resize-embeddings needs --model DIR|ID; the embedded model fits its tokenizer")
    if "eval_every" in values and "model" in values and "eval_data" not in values:
        raise UserError(f"--eval-every {values['eval_every']} needs --eval-data FILE")


def parse(argv: Sequence[str]) -> Command:
    """Parses the arguments of `chunkft`; `--help` prints and exits as argparse does.

    Raises UserError for an unknown option, a value that is not allowed, or options that exclude each other.
    """
    values = vars(_build().parse_args(argv))
    name = values.pop("command")
    values.pop("debug", None)
    if name == "plan":
        check_fit(values)
        return Command(name=name, plan=PlanSettings(**values), given=frozenset(values))
    if name == "bench":
        return Command(name=name, bench=bench_settings(values))
    if name == "doctor":
        return Command(name=name, doctor=DoctorSettings(**values))
    _check(values)
    if name == "profile":
        own = {key: values.pop(key) for key in ("steps", "warmup", "out", "nsight") if key in values}
        settings = ProfileSettings(training=FinetuneSettings(**values), **own)
        return Command(name=name, profile=settings, given=frozenset(values))
    resume = values.pop("resume", False)
    return Command(name=name, finetune=FinetuneSettings(**values), given=frozenset(values), resume=resume)
