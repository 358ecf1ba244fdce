"""`chunkft plan`: the partition of a model, from its config alone."""

from pathlib import Path

import chunkft
from chunkft.cli.errors import UserError
from chunkft.cli.job import patterns_of
from chunkft.cli.models import empty_model, quiet_transformers
from chunkft.cli.settings import PlanSettings

__all__ = ["show_plan"]


def show_plan(settings: PlanSettings | None) -> int:
    """Prints the plan of a model, saves it if asked to, and returns the exit status; raises UserError for
    wrong input.
    """
    assert settings is not None
    with quiet_transformers():
        model = empty_model(settings.model, settings.task)
    try:
        plan = chunkft.partition(
            model,
            settings.chunks,
            settings.partition,
            slice_dim=settings.slice_dim,
            always_active=patterns_of(settings.always_active, settings.task),
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    print(plan.table())
    if settings.save is not None:
        target = Path(settings.save)
        try:
            plan.save(target)
        except OSError as error:
            raise UserError(f"--save {target}: cannot be written: {error.strerror}") from error
        print(f"saved: {target}")
    return 0
