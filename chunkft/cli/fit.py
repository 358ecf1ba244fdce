"""`chunkft plan --gpu`: how a model is trained on a machine."""

from pathlib import Path
from typing import Any

import torch

import chunkft
from chunkft.cli.errors import UserError
from chunkft.cli.models import DTYPES, config_of, quiet_transformers
from chunkft.cli.presets import config_of_preset, preset_named
from chunkft.cli.settings import PlanSettings

__all__ = ["show_fit"]


def show_fit(settings: PlanSettings, given: frozenset[str]) -> int:
    """Prints the plan, or writes it as JSON; returns 0 if something fits and 1 if nothing does.

    Raises UserError for wrong input.
    """
    assert settings.gpu is not None
    fixed: dict[str, Any] = {"chunks": settings.chunks} if "chunks" in given else {}
    with quiet_transformers():
        config = _config(settings.model)
        try:
            plan = chunkft.plan_memory(
                config,
                gpu=settings.gpu,
                host=settings.ram,
                disk=settings.disk,
                tokens=settings.tokens,
                batch=settings.batch,
                link=settings.link,
                tflops=settings.tflops,
                world=settings.world,
                dtype=_dtype(settings.dtype),
                always_active=None if settings.always_active == "none" else settings.always_active.split(","),
                **fixed,
            )
        except (ValueError, TypeError) as error:
            raise UserError(str(error).replace("gpu=", "--gpu ").replace("host=", "--ram ")) from error
    if settings.json is None:
        print(plan.table())
    elif settings.json == "-":
        print(plan.to_json())
    else:
        target = Path(settings.json)
        try:
            target.write_text(plan.to_json() + "\n")
        except OSError as error:
            raise UserError(f"--json {target}: cannot be written: {error.strerror}") from error
        print(f"written: {target}")
    return 0 if plan.fits else 1


def _config(model: str) -> Any:
    preset = None if Path(model).exists() else preset_named(model)
    return config_of(model, weights=False) if preset is None else config_of_preset(preset)


def _dtype(name: str) -> torch.dtype:
    return DTYPES[name]
