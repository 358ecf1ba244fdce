"""The directory of a run: which one it is, what it was run with, and the model that ends up in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from chunkft.cli.errors import UserError
from chunkft.cli.report import write_json
from chunkft.cli.settings import FinetuneSettings
from chunkft.integrations.checkpoints import flush_tree, staging, writing

__all__ = ["RunDirectory", "open_run", "unused", "usable"]

RUN_FILE = "run.json"
MAY_CHANGE = frozenset(
    (
        "chunks",
        "interval",
        "partition",
        "schedule",
        "slice_dim",
        "always_active",
        "device",
        "eval_every",
        "save_every",
        "steps",
        "epochs",
        "quiet",
        "out",
        "fsdp",
        "dist_timeout",
    )
)
EMBEDDED_NAME = "arithmetic"


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside the directory of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoint-N directories are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON record an optimizer step and an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def picture(self) -> Path:
        """The loss over steps."""
        return self.path / "loss.png"

    @property
    def memory(self) -> Path:
        """The memory table as JSON."""
        return self.path / "memory.json"

    @property
    def recorded(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RUN_FILE).is_file()

    def resume_command(self, processes: int = 1) -> str:
        """What to type to go on with this run."""
        program = "chunkft" if processes == 1 else f"torchrun --nproc-per-node {processes} -m chunkft"
        return f"{program} finetune --resume --out {self.path}"

    def make(self) -> None:
        """Makes the directory, with that of the checkpoints; raises UserError if it cannot be made."""
        with usable(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def record(self, settings: FinetuneSettings) -> None:
        """Makes the directory, and writes down what the run is run with."""
        import chunkft

        with usable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN_FILE, {"chunkft": chunkft.__version__, "settings": asdict(settings)})

    def save_model(
        self, model: Any, tokenizer: Any, expected: int, weights: dict[str, Any] | None = None
    ) -> None:
        """Puts weights (those of the model, or `weights`), config and tokenizer into the directory, each file complete
        or absent.
        """
        with staging(self.path, "model") as aside, writing(self.path / "model.safetensors", aside, expected):
            model.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
            flush_tree(aside)
            for file in sorted(aside.iterdir()):
                os.replace(file, self.path / file.name)


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turns what the system says of a path that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from error


def _saved_settings(path: Path) -> FinetuneSettings:
    file = path / RUN_FILE
    if not file.is_file():
        raise UserError(f"--resume: {path} holds no run (it has no {RUN_FILE})")
    try:
        values = loads(file.read_text(encoding="utf-8"))["settings"]
        return FinetuneSettings(**values)
    except (JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {file} is not the record of a run of this version: {error}") from error


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _merged(saved: FinetuneSettings, settings: FinetuneSettings, given: frozenset[str]) -> FinetuneSettings:
    changed = {
        name: getattr(settings, name) for name in given if getattr(settings, name) != getattr(saved, name)
    }
    for name in sorted(changed.keys() - MAY_CHANGE):
        allowed = ", ".join(map(_option, sorted(MAY_CHANGE - {"out"})))
        was = getattr(saved, name)
        raise UserError(
            f"--resume: {_option(name)} {changed[name]} differs from {was} of the run; may change: {allowed}"
        )
    if "steps" in changed:
        changed["epochs"] = None
    if "epochs" in changed and changed["epochs"] is not None:
        changed["steps"] = None
    return replace(saved, **changed)


def unused(root: str, name: str) -> Path:
    """The first of ROOT/NAME-1, ROOT/NAME-2, ... that does not exist."""
    number = 1
    while (path := Path(root) / f"{name}-{number}").exists():
        number += 1
    return path


def open_run(
    settings: FinetuneSettings, given: frozenset[str], resume: bool
) -> tuple[RunDirectory, FinetuneSettings]:
    """Finds the directory of a run, and completes the settings of a run that is resumed.

    Raises UserError if a new run would write into a directory with something in it, or a resumed run has
    other settings.
    """
    if resume:
        assert settings.out is not None
        path = Path(settings.out)
        return RunDirectory(path), _merged(_saved_settings(path), settings, given)
    name = Path(settings.model).name if settings.model else EMBEDDED_NAME
    path = Path(settings.out) if settings.out else unused("runs", name)
    with usable(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: a file, expected a directory")
        above = next((parent for parent in path.absolute().parents if parent.exists()), None)
        if above is not None and not above.is_dir():
            raise UserError(f"--out {path}: {above} is a file, expected a directory")
        if (path / RUN_FILE).exists():
            raise UserError(
                f"--out {path}: already holds a run; add --resume to go on with it, or choose"
                f" another directory"
            )
        if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(f"--out {path}: the directory is not empty")
    return RunDirectory(path), settings
