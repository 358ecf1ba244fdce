"""Numbers in the prose of the documentation, each beside the place in a result file that it comes from.

A figure is followed by a comment, which readers do not see:

    a step takes 0.56<!-- from: step-cpu.json variants.chunk.sweep_mean_ms / variants.adamw.sweep_mean_ms --> of AdamW's

After `from:` stand the file below bench/results/ and an expression: paths into the JSON, numbers and units (MiB, GiB),
joined by + - * / and read from left to right. Parts of a path are joined by dots; an entry of a list is taken by its
number, or by what it holds: `cases[variant.chunks=16,variant.keep_state=null].gradients`. Quotes keep a path with
spaces together, and commas before a space belong to what is looked for. The figure has to be the value, rounded to as
many decimals as are written.

    a card of 24 GB<!-- given -->        a figure that is no measurement: an input, a definition, or the claim of others
"""

from __future__ import annotations

import json
import operator
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:%|[KMGT]i?B(?:/s)?|ms|us|ns|s|GFLOPS|TFLOPS|tokens/s|percent|points|seconds|minutes|hours|times)(?![\w-])"
FACTOR = r"x(?! ?\d)(?![\w-])"
# What stands for a measurement until a marker says otherwise: a decimal, or a whole number with a unit.
MEASUREMENT = re.compile(
    rf"(?<![\w.,/-])(?P<number>{NUMBER})(?![\w,]|\.\d)(?P<unit> ?(?:{UNIT}|{FACTOR}))?(?P<marker><!--.*?-->)?",
    re.DOTALL,
)
MARKED = re.compile(
    rf"(?P<number>{NUMBER})(?P<unit> ?(?:{UNIT}|{FACTOR}))?<!-- from: (?P<source>.*?) -->", re.DOTALL
)
HIDDEN = re.compile(
    r"<!-- table: .*?<!-- end -->"  # generated, and compared with their JSON by themselves
    r"|^```.*?^```|`[^`\n]*`"  # code
    r"|!\[[^\]]*\]|\]\([^)]*\)"  # descriptions of pictures, targets of links
    r"|^#.*?$"  # headings, whose words are part of addresses
    r"|(?:>=|==|arXiv|torch|Python|Apache-|sm_) ?\d[\d.]*",  # versions, names of papers, licences
    re.DOTALL | re.MULTILINE,
)
OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
STEP = re.compile(r"([^.\[\]]+)|\[([^\]]*)\]")


def look_up(data: Any, path: str) -> Any:
    """The value at `path` in parsed JSON; raises KeyError naming the part that is not there or not the only one."""
    for match in STEP.finditer(path):
        key, choice = match.groups()
        if choice is not None:
            data = _chosen(data, choice, path)
        elif isinstance(data, list) and key.lstrip("-").isdigit() and -len(data) <= int(key) < len(data):
            data = data[int(key)]
        elif isinstance(data, dict) and key in data:
            data = data[key]
        else:
            raise KeyError(f"{path!r}: there is no {key!r}")
    return data


def _chosen(entries: Any, choice: str, path: str) -> Any:
    wanted = dict(part.split("=", 1) for part in re.split(r",(?! )", choice))

    def fits(entry: Any) -> bool:
        for key, text in wanted.items():
            try:
                value = look_up(entry, key)
            except KeyError:
                value = None
            if value != _parsed(text):
                return False
        return True

    found = [entry for entry in entries if fits(entry)]
    if len(found) != 1:
        raise KeyError(f"{path!r}: [{choice}] fits {len(found)} entries; it has to fit one")
    return found[0]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def evaluate(source: str, results: Path) -> float:
    """The value that a marker's `FILE EXPRESSION` stands for.

    Raises:
        FileNotFoundError: if the file is not below `results`.
        KeyError: if a path leads nowhere. ValueError: if the expression is none.
    """
    file, *tokens = shlex.split(source)
    data = json.loads((results / file).read_text())
    if len(tokens) % 2 != 1:
        raise ValueError(f"{source!r}: needs FILE, a value, and any number of pairs of + - * / and a value")
    total = _value(tokens[0], data, source)
    for sign, token in zip(tokens[1::2], tokens[2::2], strict=True):
        if sign not in OPERATORS:
            raise ValueError(f"{source!r}: {sign!r} is no operator; allowed are + - * /")
        total = OPERATORS[sign](total, _value(token, data, source))
    return total


def _value(token: str, data: Any, source: str) -> float:
    if token in UNITS:
        return UNITS[token]
    try:
        return float(token)
    except ValueError:
        value = look_up(data, token)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{source!r}: {token!r} is {value!r}, which is no number")
    return value


def written(value: float, like: str) -> str:
    """`value` with as many decimals as the figure `like` has, and its separators of thousands."""
    decimals = len(like.partition(".")[2])
    return f"{value:,.{decimals}f}" if "," in like else f"{value:.{decimals}f}"


def refreshed(text: str, results: Path) -> str:
    """`text` with every marked figure written anew from its file."""

    def again(match: re.Match[str]) -> str:
        number = written(evaluate(match["source"], results), match["number"])
        return f"{number}{match['unit'] or ''}<!-- from: {match['source']} -->"

    return MARKED.sub(again, text)


def unmarked(text: str) -> list[str]:
    """Figures of a page that look like measurements and carry neither `from` nor `given`, with their line numbers."""
    seen = HIDDEN.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    found = []
    for match in MEASUREMENT.finditer(
        re.sub(r"<!--(?! (?:from:|given)).*?-->", _blank, seen, flags=re.DOTALL)
    ):
        if _inside_comment(seen, match.start()) or match["marker"]:
            continue
        if "." in match["number"] or match["unit"]:
            line = seen.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: {match['number']}{match['unit'] or ''}")
    return found


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _inside_comment(text: str, place: int) -> bool:
    return text.rfind("<!--", 0, place) > text.rfind("-->", 0, place)
