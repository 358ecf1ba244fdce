"""Reads jsonl, tsv and csv line by line; every mistake is told with its file and line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chunkft.cli.errors import UserError

__all__ = ["LABEL_NAMES", "TEXT_NAMES", "Row", "open_lines", "read_json_rows", "read_labelled_rows", "where"]

TEXT_NAMES = ("text", "sentence")
LABEL_NAMES = ("label", "labels", "class")
SUFFIXES = (".jsonl", ".tsv", ".csv")

Row = tuple[int, dict[str, Any]]


def where(path: Path, line: int) -> str:
    """The place that an error message starts with."""
    return f"{path}, line {line}"


def open_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of the lines of a UTF-8 file that are not blank.

    Raises UserError for a file that is missing, unreadable, or not UTF-8.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{where(path, number)}: byte 0x{raw[error.start]:02x} at column"
                        f" {error.start + 1} is not UTF-8"
                    ) from error
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def suffix_of(path: Path, allowed: tuple[str, ...]) -> str:
    """The lower-case suffix of a data file; raises UserError if it is not one of `allowed`."""
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise UserError(
            f"{path}: data files of this task end in {' or '.join(allowed)}, not in {suffix or 'no suffix'!r}"
        )
    return suffix


def read_json_rows(path: Path) -> Iterator[Row]:
    """Yields (line number, object) of a jsonl file; raises UserError for a line that is not a JSON object."""
    for number, line in open_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where(path, number)}: not JSON: {error.msg} at column {error.colno}, found {_shown(line)};"
                " each line is one JSON object"
            ) from error
        except (ValueError, RecursionError) as error:  # numbers and nesting without end
            raise UserError(f"{where(path, number)}: cannot be read as JSON: {error}") from error
        if "\\u" in line and not _is_text(row):
            raise UserError(
                f"{where(path, number)}: has half of a surrogate pair, an escape like \\ud800 that is no character"
            )
        if not isinstance(row, dict):
            raise UserError(f"{where(path, number)}: found {_shown(line)}; each line is one JSON object")
        yield number, row


def _is_text(row: Any) -> bool:
    """Whether all of its strings can be written as UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _split(line: str, suffix: str, path: Path, number: int) -> list[str]:
    if suffix == ".tsv":
        return line.split("\t")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise UserError(f"{where(path, number)}: not csv: {error}, found {_shown(line)}") from error


def _named(names: list[str], wanted: tuple[str, ...]) -> int | None:
    return next((index for index, name in enumerate(names) if name.strip().lower() in wanted), None)


def _column(option: str, value: str, cells: list[str], has_header: bool, path: Path) -> int:
    if has_header and value in cells:
        return cells.index(value)
    if value.isdigit() and 1 <= int(value) <= len(cells):
        return int(value) - 1
    allowed = ", ".join(repr(cell) for cell in cells) if has_header else "no header, so numbers only"
    raise UserError(f"{option} {value!r}: {path} has columns 1 to {len(cells)} ({allowed})")


def read_labelled_rows(
    path: Path, text_column: str | None, label_column: str | None
) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, text, label) of tsv or csv rows, or of jsonl objects.

    The first row is a header if one of its cells is a name that is asked for, or else text, sentence, label,
    labels or
    class. Without a header, and without columns asked for, a file of two columns is label, text. A tsv knows
    no quoting.
    Raises UserError for columns that are not there, a row of another width, an empty text or label, an empty
    file.
    """
    suffix = suffix_of(path, SUFFIXES)
    if suffix == ".jsonl":
        yield from _labelled_objects(path, text_column, label_column)
        return
    lines = open_lines(path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path}: empty file; expected rows with a label and a text column")
    cells = _split(first[1], suffix, path, first[0])
    wanted_text = (text_column.lower(),) if text_column else TEXT_NAMES
    wanted_label = (label_column.lower(),) if label_column else LABEL_NAMES
    has_header = _named(cells, wanted_text) is not None or _named(cells, wanted_label) is not None
    text_at, label_at = _columns(cells, has_header, text_column, label_column, path)
    if not has_header:
        yield _labelled(cells, text_at, label_at, path, first[0])
    rows = 0
    for number, line in lines:
        row = _split(line, suffix, path, number)
        if len(row) != len(cells):
            raise UserError(
                f"{where(path, number)}: {len(row)} columns, expected {len(cells)} as in line {first[0]}"
            )
        rows += 1
        yield _labelled(row, text_at, label_at, path, number)
    if has_header and rows == 0:
        raise UserError(f"{path}: no rows after the header in line {first[0]}")


def _columns(
    cells: list[str], has_header: bool, text_column: str | None, label_column: str | None, path: Path
) -> tuple[int, int]:
    text_at = label_at = None
    if text_column is not None:
        text_at = _column("--text-column", text_column, cells, has_header, path)
    elif has_header:
        text_at = _named(cells, TEXT_NAMES)
    if label_column is not None:
        label_at = _column("--label-column", label_column, cells, has_header, path)
    elif has_header:
        label_at = _named(cells, LABEL_NAMES)
    if not has_header and text_column is None and label_column is None and len(cells) == 2:
        return 1, 0
    if text_at is None or label_at is None:
        missing = "text (or sentence)" if text_at is None else "label"
        found = ", ".join(repr(cell) for cell in cells)
        raise UserError(
            f"{where(path, 1)}: no {missing} column among {found}; name it in a header, or give"
            f" --text-column and"
            " --label-column (without a header, exactly two columns are label, text)"
        )
    if text_at == label_at:
        raise UserError(f"{path}: --text-column and --label-column are both column {text_at + 1}")
    return text_at, label_at


def _labelled(row: list[str], text_at: int, label_at: int, path: Path, number: int) -> tuple[int, str, str]:
    text, label = row[text_at].strip(), row[label_at].strip()
    if not text or not label:
        empty, at = ("text", text_at) if not text else ("label", label_at)
        raise UserError(f"{where(path, number)}: the {empty} in column {at + 1} is empty")
    return number, text, label


def _labelled_objects(
    path: Path, text_column: str | None, label_column: str | None
) -> Iterator[tuple[int, str, str]]:
    texts = (text_column,) if text_column else TEXT_NAMES
    labels = (label_column,) if label_column else LABEL_NAMES
    rows = 0
    for number, row in read_json_rows(path):
        text_key = next((name for name in texts if name in row), None)
        label_key = next((name for name in labels if name in row), None)
        if text_key is None or label_key is None:
            found = ", ".join(repr(name) for name in row) or "no keys"
            raise UserError(
                f"{where(path, number)}: found {found}; a labelled line has one of"
                f" {', '.join(texts)} and one of"
                f" {', '.join(labels)}"
            )
        text, label = row[text_key], row[label_key]
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{where(path, number)}: {text_key!r} is {_shown(json.dumps(text))}, expected a"
                f" text that is not empty"
            )
        if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
            raise UserError(
                f"{where(path, number)}: {label_key!r} is {_shown(json.dumps(label))}, expected a"
                f" text or whole number"
            )
        rows += 1
        yield number, text.strip(), str(label).strip()
    if rows == 0:
        raise UserError(f"{path}: empty file; expected JSON objects with a text and a label")
