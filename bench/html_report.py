"""One self-contained HTML page from result files: tables, pictures, machine, versions, commit, how to repeat it.

python -m bench.html_report --results bench/results [MORE ...] --out report.html

The page needs nothing from elsewhere and no script, and forbids both to itself. Result files of an unknown form are
shown as tables of what they hold.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import common
from . import html_parts as parts
from . import html_views as views

STYLE = Path(__file__).with_suffix(".css")
FEW = 150  # so many values are shown at once where there is no picture
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Result:
    """A result file: its name in the page, its content, and why it could not be read (else None)."""

    name: str
    path: Path
    data: dict[str, Any]
    error: str | None = None

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


def read(path: Path, name: str) -> Result:
    """Reads a .json or .jsonl file; anything but an object is put under `records` or `value`."""
    try:
        if path.suffix == ".jsonl":
            return Result(name, path, {"records": common.read_jsonl(path)})
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return Result(name, path, {}, f"{type(error).__name__}: {error}")
    return Result(name, path, data if isinstance(data, dict) else {"value": data})


def collect(folders: Iterable[Path]) -> list[Result]:
    """Every result file below the folders, in order of their names.

    Raises:
        FileNotFoundError: if a folder does not exist, or if none holds a result file.
    """
    found = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"results={folder}: is not a folder")
        prefix = f"{folder.name}/" if len(folders) > 1 else ""
        for path in sorted(folder.rglob("*.json*")):
            if path.suffix in (".json", ".jsonl") and path.is_file():
                found.append(read(path, prefix + path.relative_to(folder).as_posix()))
    if not found:
        raise FileNotFoundError(f"results={', '.join(map(str, folders))}: no .json or .jsonl file below")
    return found


def facts_of(result: Result) -> dict[str, Any]:
    """Who measured: the header of the file, or of the first record of a .jsonl file."""
    records = result.data.get("records")
    first = records[0] if isinstance(records, list) and records else None
    own = any(key in result.data for key in views.HEADER)
    source = result.data if own or not isinstance(first, dict) else first
    return {key: source[key] for key in views.HEADER if key in source}


def section(result: Result) -> str:
    """One file: facts, command, pictures, and all values."""
    facts = facts_of(result)
    badge = f' <span class="badge">{parts.escape(facts["kind"])}</span>' if "kind" in facts else ""
    shown = [f"<h2>{parts.escape(result.name)}{badge}</h2>"]
    if result.error is not None:
        shown.append(f'<p class="note">This file cannot be read: {parts.escape(result.error)}</p>')
        return _section(result, shown)
    commit = str(facts.get("commit", ""))
    items = {k: facts[k] for k in ("device", "threads", "seed", "time") if k in facts}
    if commit:
        items["commit"] = commit.removesuffix("-dirty")[:12]
    items |= facts.get("versions", {}) if isinstance(facts.get("versions"), dict) else {}
    facts_list = "".join(f"<li><b>{parts.escape(k)}</b>{parts.escape(v)}</li>" for k, v in items.items())
    shown.append(f'<ul class="facts">{facts_list}</ul>')
    if "command" in facts:
        base = commit.removesuffix("-dirty")
        checkout = f"git checkout {base}\n" if base and base != "unknown" else ""
        shown.append(f"<pre>{parts.escape(checkout + str(facts['command']))}</pre>")
    if commit.endswith("-dirty"):
        shown.append(
            '<p class="soft">Measured with changes on top of that commit that were not committed yet.</p>'
        )
    shown.append(views.pictures(result.data))
    rest = {key: value for key, value in result.data.items() if key not in views.HEADER}
    size = sum(1 for _ in views.scalars(rest))
    opened = " open" if not shown[-1] and size < FEW else ""
    shown.append(
        f"<details{opened}><summary>All values ({size:,})</summary>{views.values('', rest)}</details>"
    )
    return _section(result, shown)


def _section(result: Result, shown: Iterable[str]) -> str:
    inner = "\n".join(shown)
    return f'<section id="{result.anchor}">\n{inner}\n</section>\n'


def machines(results: Iterable[Result]) -> str:
    """Which machine measured what, with which versions."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        facts = facts_of(result)
        versions = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
        text = ", ".join(
            f"{k} {versions[k]}" for k in ("python", "torch", "triton", "driver") if k in versions
        )
        rows.setdefault((str(facts.get("device", "not named")), text or "not named"), []).append(result.name)
    body = [[device, versions, len(names)] for (device, versions), names in rows.items()]
    return parts.table(("machine", "versions", "files"), body, "Machines")


def images(folders: Iterable[Path]) -> str:
    """The pictures that lie beside the result files, inside of the page."""
    drawn = []
    for path in sorted(p for folder in folders for p in folder.rglob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        drawn.append(
            f'<figure><img alt="{parts.escape(path.stem)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{parts.escape(path.name)}</figcaption></figure>"
        )
    if not drawn:
        return ""
    return f'<section id="pictures"><h2>Pictures beside the files</h2>{"".join(drawn)}</section>'


def page(results: list[Result], folders: list[Path]) -> str:
    """The whole page; files with a picture come first."""
    results = sorted(results, key=lambda r: not views.pictures(r.data))
    contents = "".join(f'<li><a href="#{r.anchor}">{parts.escape(r.name)}</a></li>' for r in results)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    drawn = images(folders)
    if drawn:
        contents += '<li><a href="#pictures">Pictures beside the files</a></li>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>chunkft: measured</title>
<link rel="icon" href="data:,">
<style>
{STYLE.read_text()}</style>
</head>
<body>
<main>
<h1>chunkft: measured</h1>
<p class="soft">{len(results)} result files, shown as they are. Every figure has its machine, its versions, its
commit and the command that measures it again; what is marked as predicted was computed and not measured.</p>
<section>
{machines(results)}
<nav aria-label="Result files"><ul>{contents}</ul></nav>
</section>
{"".join(section(r) for r in results)}
{drawn}
<footer>Made {made} by <code>python -m bench.html_report</code>, chunkft at commit {common.commit()[:12]}.</footer>
</main>
</body>
</html>
"""


def build(results: Path | Iterable[Path], out: Path) -> list[Result]:
    """Writes the page for one folder of result files, or several, to `out`, and returns what is in it.

    Raises:
        FileNotFoundError: if a folder does not exist, or if none holds a result file; `out` is then left as it was.
    """
    folders = [results] if isinstance(results, Path) else list(results)
    found = collect(folders)
    text = page(found, folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(out)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.html_report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, nargs="+", default=[common.RESULTS], metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        found = build(args.results, args.out)
    except FileNotFoundError as error:
        print(f"bench.html_report: {error}", file=sys.stderr)
        return 2
    for result in found:
        if result.error is not None:
            print(f"bench.html_report: {result.path}: {result.error}", file=sys.stderr)
    print(f"{args.out}: {len(found)} result files, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
