"""Results that are on disk as soon as they exist: a killed benchmark leaves all but the case in which it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import common

ENDED = "the process ended in this case"


class Records(Mapping[str, dict[str, Any]]):
    """Records by key, written to a JSON file after each: an object below `field` of it, after what `head` says.

    With `resume`, keys that are in the file stay and count as done. The case in which the process before ended does
    too, with an error as its record: whatever ended that process would end this one.
    """

    def __init__(
        self, path: Path, head: Mapping[str, Any], field: str = "records", resume: bool = False
    ) -> None:
        self.path, self.field = path, field
        self._head = dict(head)
        self._found: dict[str, dict[str, Any]] = {}
        if resume and path.exists():
            before = json.loads(path.read_text())
            self._found = before.get(field, {})
            if before.get("running") is not None:
                self._found[before["running"]] = {"error": ENDED}
        self._write(None)

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @contextmanager
    def case(self, key: str) -> Iterator[dict[str, Any]]:
        """The record of `key` to fill in; it is named in the file before the body runs, and written after it.

        An exception of the body becomes the record's `error`, and goes on.
        """
        record: dict[str, Any] = {}
        self._write(key)
        try:
            yield record
        except BaseException as error:
            record["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            raise
        finally:
            self._found[key] = record
            self._write(None)

    def note(self, **values: Any) -> None:
        """Adds values beside the records, such as a summary."""
        self._head.update(values)
        self._write(None)

    def _write(self, running: str | None) -> None:
        content = {**self._head, "running": running, self.field: self._found}
        common.write_json(self.path, content)
