"""One table from the CSV of Nsight Compute: time, tensor cores, bytes, stalls of each kernel and shape.

python -m bench.ncu_table REPORT.csv              the table; --markdown for a page, --json OUT for all of it
python -m bench.ncu_table --metrics               what `make ncu` asks for, as ncu's option of this name takes it

Read are both pages that ncu writes with --csv: `--page raw`, a column a metric and a row of units, and `--page
details`, a row a metric. A launch belongs to its innermost NVTX range, which bench.ncu_targets names by kernel and
shape; a range with several launches gets a line for all of them. What ncu did not collect is n/a.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIME = "gpu__time_duration.sum"
READ = "dram__bytes_read.sum"
WRITTEN = "dram__bytes_write.sum"
MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
# The first that was collected counts. Cycles of all multiprocessors come first: idle ones are a loss as well.
TENSOR = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
)
# Stalls come with the section WarpStateStats, which asks for those that the chip has: `gmma` exists on 9.0 only.
METRICS = (TIME, TENSOR[0], TENSOR[1], READ, WRITTEN, MEMORY, L2, OCCUPANCY, REGISTERS)
# The page of details calls metrics of a section by their labels.
LABELS = {
    ("GPU Speed Of Light Throughput", "Duration"): TIME,
    ("GPU Speed Of Light Throughput", "DRAM Throughput"): MEMORY,
    ("GPU Speed Of Light Throughput", "L2 Cache Throughput"): L2,
    ("Occupancy", "Achieved Occupancy"): OCCUPANCY,
    ("Launch Statistics", "Registers Per Thread"): REGISTERS,
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
STALLS_SHOWN = 3

MICROSECONDS = {
    **dict.fromkeys(("ns", "nsecond", "nanosecond"), 1e-3),
    **dict.fromkeys(("us", "usecond", "microsecond"), 1.0),
    **dict.fromkeys(("ms", "msecond", "millisecond"), 1e3),
    **dict.fromkeys(("s", "second"), 1e6),
}
BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}  # ncu scales by thousands
PERCENT = {"%": 1.0}
UNITS = {TIME: MICROSECONDS, READ: BYTES, WRITTEN: BYTES} | dict.fromkeys(
    (*TENSOR, MEMORY, L2, OCCUPANCY), PERCENT
)

RANGES = "Push/Pop_Range"
RANGE = re.compile(r'<default domain>:([^:"]*)')
NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
ABSENT = re.compile(r"|(?:\(!\) ?)?(?:n/a|[-+]?nan(?:\(.*\))?|[-+]?inf)", re.IGNORECASE)


@dataclass(frozen=True)
class Launch:
    """A launch that ncu profiled; of `metrics`, times are in microseconds, sizes in bytes, shares in percent."""

    number: str
    target: str
    kernel: str
    grid: str
    block: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the table; None is what was not collected. `stalls` are warps that wait at each issued instruction."""

    target: str
    kernel: str
    time_us: float | None
    tensor_pct: float | None
    read_bytes: float | None
    written_bytes: float | None
    gbytes_per_s: float | None
    memory_pct: float | None
    l2_pct: float | None
    stalls: dict[str, float]
    registers: float | None
    occupancy_pct: float | None


def read(text: str, source: str) -> list[Launch]:
    """The launches of a report in ncu's CSV, in their order; `source` names it in errors.

    Raises ValueError where the text is no such report, holds no launch, or is damaged.
    """
    records = _records(text, source)
    try:
        _, header = next(records)
    except StopIteration:
        said = "; ".join(line for line in text.splitlines() if re.match(r"==(ERROR|WARNING)==", line))
        raise ValueError(
            f"{source} is no CSV of ncu: no line begins with ID and names Kernel Name, as `ncu --csv` writes it"
            + (f". ncu said: {said}" if said else "")
        ) from None
    found = _long(records, header, source) if "Metric Name" in header else _wide(records, header, source)
    if not found:
        raise ValueError(f"{source} holds no launch: ncu profiled nothing")
    return found


def _records(text: str, source: str) -> Iterator[tuple[int, list[str]]]:
    """Numbers of lines and cells of the header and of what belongs below it; other output in between is left out."""
    header: list[str] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if line.startswith("==") or not line.strip():
            continue
        try:
            (cells,) = csv.reader([line], strict=True)
        except csv.Error as error:
            if header and line.startswith('"'):
                raise ValueError(
                    f"{source}, line {number}: the line is cut off or damaged ({error})"
                ) from None
            continue
        if not header:
            if cells[0] == "ID" and "Kernel Name" in cells:
                header = cells
                yield number, cells
            continue
        if not (cells[0].isdigit() or line.startswith(('"', ","))):
            continue  # what the profiled program printed
        least = header.index("Metric Value") + 1 if "Metric Value" in header else len(header)
        if not least <= len(cells) <= len(header):
            raise ValueError(f"{source}, line {number}: {len(cells)} cells, but the header has {len(header)}")
        yield number, cells


def _wide(records: Iterator[tuple[int, list[str]]], header: list[str], source: str) -> list[Launch]:
    number, units = next(records, (0, ["?"]))
    if units[0]:
        raise ValueError(f"{source}: no row of units follows the header, as `ncu --csv --page raw` writes it")
    found = []
    for number, cells in records:
        metrics = {}
        for name, unit, text in zip(header, units, cells, strict=True):
            if "__" in name and (value := _value(name, unit, text, f"{source}, line {number}")) is not None:
                metrics[name] = value
        found.append(_launch(dict(zip(header, cells, strict=True)), metrics, f"{source}, line {number}"))
    return found


def _long(records: Iterator[tuple[int, list[str]]], header: list[str], source: str) -> list[Launch]:
    found: dict[tuple[str, str], Launch] = {}
    for number, cells in records:
        row, where = dict(zip(header, cells, strict=False)), f"{source}, line {number}"
        launch = found.setdefault((row.get("Process ID", ""), row["ID"]), _launch(row, {}, where))
        name = LABELS.get((row.get("Section Name", ""), row["Metric Name"]), row["Metric Name"])
        if "__" in name:
            value = _value(name, row.get("Metric Unit", ""), row["Metric Value"], where)
            if value is not None:
                launch.metrics[name] = value
    return list(found.values())


def _launch(row: dict[str, str], metrics: dict[str, float], where: str) -> Launch:
    if not row["ID"].isdigit():
        raise ValueError(f"{where}: ID is {row['ID']!r}, expected a whole number")
    ranges = [name for column, cell in row.items() if RANGES in column for name in RANGE.findall(cell)]
    return Launch(
        row["ID"],
        ranges[-1].removeprefix("ncu ") if ranges else "",
        row["Kernel Name"],
        row.get("Grid Size", ""),
        row.get("Block Size", ""),
        metrics,
    )


def _value(name: str, unit: str, text: str, where: str) -> float | None:
    """The number in a cell in the unit of `Launch`; None where ncu has none, or where no table needs it.

    Raises ValueError for a number or a unit that cannot be read.
    """
    known = UNITS.get(name)
    if known is None and name != REGISTERS and not STALL.fullmatch(name):
        return None
    text = text.split(" (")[0].strip() if not text.startswith("(") else text.strip()
    if ABSENT.fullmatch(text):
        return None
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{where}: {name} is {text!r}, expected a number such as 1,234.5 (is LC_ALL=C set?)")
    if known is not None and unit not in known:
        raise ValueError(f"{where}: {name} is in {unit!r}; known are {', '.join(known)}")
    return float(text.replace(",", "")) * (1.0 if known is None else known[unit])


def rows_of(launches: Sequence[Launch], peak: float | None = None) -> list[Row]:
    """A row a launch, and below the launches of a range, where they are several, one for all of them together.

    `peak` is the memory's speed in GB/s; without it the share of it is what ncu says.
    """
    rows: list[Row] = []
    group: list[Row] = []
    for launch in launches:
        row = _row(launch, peak)
        if group and (row.target != group[0].target or not row.target):
            rows += _together(group)
            group = []
        rows.append(row)
        group.append(row)
    return rows + _together(group)


def _row(launch: Launch, peak: float | None) -> Row:
    get = launch.metrics.get
    stalls = {m[1]: value for name, value in launch.metrics.items() if (m := STALL.fullmatch(name))}
    stalls.pop("selected", None)  # the warp that issues waits for nothing
    rate = _rate(get(READ), get(WRITTEN), get(TIME))
    return Row(
        launch.target,
        launch.kernel,
        get(TIME),
        next((launch.metrics[name] for name in TENSOR if name in launch.metrics), None),
        get(READ),
        get(WRITTEN),
        rate,
        get(MEMORY) if peak is None else None if rate is None else 100 * rate / peak,
        get(L2),
        dict(sorted(stalls.items(), key=lambda item: -item[1])[:STALLS_SHOWN]),
        get(REGISTERS),
        get(OCCUPANCY),
    )


def _together(rows: Sequence[Row]) -> list[Row]:
    if len(rows) < 2:
        return []
    times = [row.time_us for row in rows]

    def total(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    def mean(values: Sequence[float | None]) -> float | None:
        pairs = [None if v is None or t is None else v * t for v, t in zip(values, times, strict=True)]
        whole, time = total(pairs), total(times)
        return whole / time if whole is not None and time else None

    got, put = total([row.read_bytes for row in rows]), total([row.written_bytes for row in rows])
    return [
        Row(
            rows[0].target,
            f"all {len(rows)} launches",
            total(times),
            mean([row.tensor_pct for row in rows]),
            got,
            put,
            _rate(got, put, total(times)),
            mean([row.memory_pct for row in rows]),
            mean([row.l2_pct for row in rows]),
            {},
            None,
            mean([row.occupancy_pct for row in rows]),
        )
    ]


def _rate(got: float | None, put: float | None, microseconds: float | None) -> float | None:
    return (got + put) / microseconds / 1e3 if got is not None and put is not None and microseconds else None


COLUMNS = (
    *("kernel and shape", "launch", "us", "tensor cores", "read MB", "written MB"),
    *("GB/s", "of peak", "L2", "registers", "occupancy", "stalls"),
)


def cells(row: Row) -> list[str]:
    """The row as text, in the order of COLUMNS."""

    def number(value: float | None, form: str = "{:.1f}", by: float = 1.0) -> str:
        return "n/a" if value is None else form.format(value / by)

    stalls = ", ".join(f"{name} {value:.2f}" for name, value in row.stalls.items())
    return [
        row.target or "-",
        short(row.kernel),
        number(row.time_us),
        number(row.tensor_pct, "{:.1f} %"),
        number(row.read_bytes, by=1e6),
        number(row.written_bytes, by=1e6),
        number(row.gbytes_per_s, "{:.0f}"),
        number(row.memory_pct, "{:.0f} %"),
        number(row.l2_pct, "{:.0f} %"),
        number(row.registers, "{:.0f}"),
        number(row.occupancy_pct, "{:.0f} %"),
        stalls or "n/a",
    ]


def short(kernel: str, most: int = 44) -> str:
    """The name without result and parameters, cut to `most` characters."""
    name = re.sub(r"^void ", "", kernel).replace("(anonymous namespace)::", "")
    name = re.sub(r"(?<=.)\((?!int\)|bool\)|unsigned).*", "", name)
    return name if len(name) <= most else name[: most - 3] + "..."


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """The rows below their headings, as aligned text or as Markdown."""
    lines = [list(COLUMNS), *map(cells, rows)]
    if markdown:
        lines.insert(1, ["---"] * len(COLUMNS))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 1, len(COLUMNS) - 1)
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.ncu_table", description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, nargs="?", help="what `ncu --csv` wrote")
    parser.add_argument("--metrics", action="store_true", help="print the metrics that the table reads")
    parser.add_argument("--peak", type=float, metavar="GB/S", help="memory speed to hold the rate against")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, help="write every row and the machine as JSON")
    args = parser.parse_args(arguments)
    if args.metrics:
        print(",".join(METRICS))
        return
    if args.report is None:
        parser.error("REPORT.csv or --metrics is needed")
    if args.peak is not None and not args.peak > 0:
        parser.error(f"--peak is {args.peak}, expected GB/s above 0")
    try:
        rows = rows_of(read(args.report.read_text(errors="replace"), str(args.report)), args.peak)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(table(rows, args.markdown))
    if args.json:
        from . import common  # torch takes seconds to import

        content: dict[str, Any] = {"kind": "profiled", "report": str(args.report), "peak_gb_s": args.peak}
        common.write_json(args.json, common.header(0) | content | {"rows": [asdict(row) for row in rows]})
        print(args.json)


if __name__ == "__main__":
    main()
