"""Pictures for the result files whose form is known; every other part of a file is shown as tables of what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import html_parts as parts

MIB, GIB = 2**20, 2**30
HEADER = ("command", "device", "threads", "versions", "commit", "seed", "time", "kind")
# Endings of names that say that the numbers of a group may be compared, and in which unit.
UNITS = {"gbs": "GB/s", "gb_s": "GB/s", "us": "µs", "ms": "ms", "s": "s", "bytes": "bytes"}
DEEP = 3
MANY = 30  # mappings of one kind are the rows of one table
FEW = 4  # so many mappings still stand in the cell of a table


def steps(result: dict[str, Any]) -> str | None:
    """Step time of each variant over the steps of a sweep (bench.step), with the quartiles of single steps."""
    found = result.get("variants")
    if not _rows_with(found, "sweep_mean_ms"):
        return None
    rows = [(name, [v["sweep_mean_ms"]], _pair(v.get("quartiles_ms"))) for name, v in found.items()]
    full = found.get("adamw", {}).get("sweep_mean_ms")
    drawn = parts.bars(rows, "ms", "Mean time of a step", digits=0)
    text = f"Mean step over a sweep (K={result.get('chunks')}, T={result.get('interval')}); the line spans quartiles."
    if full:
        shares = [[name, v["sweep_mean_ms"] / full] for name, v in found.items()]
        drawn += parts.table(("variant", "x adamw"), [[n, round(s, 3)] for n, s in shares], "Ratios to AdamW")
    return parts.figure(drawn, text)


def residencies(result: dict[str, Any]) -> str | None:
    """Step time and bytes held, for every place that state can live (bench.residency)."""
    found = result.get("variants")
    if not isinstance(found, dict) or not any(
        "held_bytes" in v for v in found.values() if isinstance(v, dict)
    ):
        return None
    good = {name: v for name, v in found.items() if "held_bytes" in v}
    times = parts.bars(
        [(name, [v["median_ms"]], _pair(v.get("quartiles_ms"))) for name, v in good.items()],
        "ms",
        "Median step",
    )
    names = ("gradients", "state")
    held = [(name, [v["held_bytes"][n] / MIB for n in names], None) for name, v in good.items()]
    memory = parts.legend(names) + parts.bars(held, "MiB", "Bytes held on the device")
    failed = "".join(
        f'<p class="note">{parts.escape(n)}: {parts.escape(v["error"])}</p>'
        for n, v in found.items()
        if "error" in v
    )
    return (
        parts.figure(times, "Median step; the line spans quartiles.") + parts.figure(memory, "Held.") + failed
    )


def memory(result: dict[str, Any]) -> str | None:
    """Counted bytes of each case (bench.memory), stacked."""
    cases = result.get("cases")
    names = ("gradients", "state", "masters", "saved_activations")
    if not isinstance(cases, list) or not all(isinstance(c, dict) and set(names) <= c.keys() for c in cases):
        return None
    rows = [(_variant(c.get("variant", {})), [c[n] / MIB for n in names], None) for c in cases]
    drawn = parts.legend([n.replace("_", " ") for n in names]) + parts.bars(
        rows, "MiB", "Bytes beside the weights"
    )
    return parts.figure(drawn, "What training holds beside the weights, the most over the steps of a sweep.")


def predictions(result: dict[str, Any]) -> str | None:
    """Predicted bytes on the device (bench.predict), stacked, one picture a shape."""
    cases = result.get("cases")
    names = ("weights", "gradients", "state", "activations", "backward")
    if not isinstance(cases, list) or not all(
        isinstance(c, dict) and _rows_with(c.get("rows"), "peak") for c in cases
    ):
        return None
    drawn = []
    for case in cases:
        rows = [(f"{r['variant']}, K={r['chunks']}", [r[n] / GIB for n in names], None) for r in case["rows"]]
        text = f"{case['model']}, {case['tokens']:,} tokens, batch {case['batch']}"
        drawn.append(
            parts.figure(parts.legend(names) + parts.bars(rows, "GiB", text, digits=2), f"Predicted: {text}.")
        )
    return "".join(drawn)


def kernels(result: dict[str, Any]) -> str | None:
    """Geometric means over the cases of each form (bench.kernels), a row a GPU."""
    means = result.get("geometric_means")
    if not isinstance(means, dict) or not all(_rows_with(v, "mean") for v in means.values()):
        return None
    forms = list(dict.fromkeys(form for found in means.values() for form in found))
    rows = [[gpu, *(found.get(form, {}).get("mean") for form in forms)] for gpu, found in means.items()]
    drawn = parts.table(("speed-up over PyTorch", *forms), rows, "Geometric means over the cases")
    return parts.figure(drawn, "Geometric means over the cases; above 1 the Triton kernel is the faster one.")


def costs(result: dict[str, Any]) -> str | None:
    """Processor time of a step of each method (bench.quality_cost)."""
    found = result.get("methods")
    if not _rows_with(found, "mean_ms"):
        return None
    rows = [(n, [v["mean_ms"]], _pair((v.get("quartiles_ms") or [None])[::2])) for n, v in found.items()]
    return parts.figure(
        parts.bars(rows, "ms", "Time of a step", digits=0), "Mean step; the line spans quartiles."
    )


def accuracies(result: dict[str, Any]) -> str | None:
    """Accuracy of every configuration of the quality study (bench.quality)."""
    found = result.get("rows")
    if not _rows_with(found, "accuracy"):
        return None
    rows = []
    for row in sorted(found, key=lambda r: -r["accuracy"]):
        score, error = 100 * row["accuracy"], 100 * row.get("error", 0.0)
        options = row.get("options", {})
        setting = f", K={options['chunks']}" if "chunks" in options else ""
        name = f"{row['method']}{setting}, {row['steps']} steps, lr {row['lr']:g}"
        rows.append((name, [score], (score - error, score + error)))
    return parts.figure(
        parts.bars(rows, "%", "Accuracy"), "Accuracy; the line is a standard error to either side."
    )


def runs(result: dict[str, Any]) -> str | None:
    """Learning curves of single runs (runs.jsonl of bench.quality), the first seed of each method."""
    found = result.get("records")
    if not _rows_with(found, "curve"):
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in found:
        if run["curve"] and run["method"] not in curves:
            curves[run["method"]] = [(x, 100 * y) for x, y in run["curve"]]
    if not curves:
        return None
    return parts.figure(
        parts.lines(curves, "steps", "accuracy, %"), "The first run of each method in the file."
    )


def losses(result: dict[str, Any]) -> str | None:
    """The loss over the steps (bench.gsm8k)."""
    means = result.get("loss_mean_of_20_steps")
    if not parts.is_series(means):
        return None
    curve = {"loss": [(20.0 * (i + 1), v) for i, v in enumerate(means)]}
    return parts.figure(parts.lines(curve, "steps", "loss"), "Means of 20 steps.")


def transcripts(result: dict[str, Any]) -> str | None:
    """What commands printed (bench.tutorial)."""
    found = result.get("runs")
    if not _rows_with(found, "output") or not isinstance(found, dict):
        return None
    return "".join(
        f"<details><summary>{parts.escape(r['command'])}</summary><pre>{parts.escape(chr(10).join(r['output']))}</pre></details>"
        for r in found.values()
    )


VIEWS: tuple[Callable[[dict[str, Any]], str | None], ...] = (
    steps,
    residencies,
    memory,
    predictions,
    kernels,
    costs,
    accuracies,
    runs,
    losses,
    transcripts,
)


def pictures(result: dict[str, Any]) -> str:
    """Every picture that fits the form of a result; a form that only resembles a known one is left to the tables."""
    drawn = []
    for view in VIEWS:
        try:
            drawn.append(view(result) or "")
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return "".join(drawn)


def values(name: str, value: Any, depth: int = 0) -> str:
    """Everything that a JSON value holds, as tables; a group of numbers of one unit is drawn as well."""
    heading = f"<h3>{parts.escape(name)}</h3>\n" if name and depth else ""
    if isinstance(value, dict):
        return heading + _mapping(name, value, depth)
    if isinstance(value, list):
        return heading + _sequence(name, value, depth)
    return heading + f"<p>{parts.escape(parts.number(value))}</p>"


def _mapping(name: str, value: dict[str, Any], depth: int) -> str:
    if len(value) > 1 and all(isinstance(v, dict) and v and not _nested(v) for v in value.values()):
        return _matrix(list(value.items()), name or "values")
    if len(value) > MANY and all(isinstance(v, dict) for v in value.values()):
        return _sequence(name or "values", [{"key": k, **v} for k, v in value.items()], depth)
    plain = {k: v for k, v in value.items() if not _nested({k: v}) or _plain_list(v)}
    shown = []
    unit = next((text for ending, text in UNITS.items() if name.endswith(f"_{ending}")), None)
    if unit and len(plain) > 1 and all(parts.is_number(v) for v in plain.values()):
        shown.append(parts.bars([(k, [float(v)], None) for k, v in plain.items()], unit, name, digits=None))
    elif plain:
        mixed = not all(parts.is_number(v) for v in plain.values())
        rows = [[k, parts.words(v) if mixed and not parts.is_series(v) else v] for k, v in plain.items()]
        shown.append(parts.table(("", "value"), rows, name or "values"))
    inner = [values(k, v, depth + 1) for k, v in value.items() if k not in plain]
    if inner and depth >= DEEP:
        shown.append(f"<details><summary>more</summary><div class=nested>{''.join(inner)}</div></details>")
    else:
        shown += inner
    return "".join(shown)


def _sequence(name: str, value: list[Any], depth: int) -> str:
    if value and all(isinstance(v, dict) for v in value):
        rows = [flat(v) for v in value]
        apart = [(i, key, v) for i, row in enumerate(rows) for key, v in row.items() if _many(v)]
        main = [(None, {k: v for k, v in row.items() if not _many(v)}) for row in rows]
        return _matrix(main, name) + "".join(
            values(f"{name} {i}, {key}", v, depth + 1) for i, key, v in apart
        )
    if parts.is_series(value) and len(value) > parts.LONG_SERIES:
        return f"<p>{parts.series(value)}</p>"
    if value and all(isinstance(v, str) for v in value):
        return "<pre>" + parts.escape("\n".join(value)) + "</pre>"
    return parts.table((name or "value",), [[v] for v in value], name or "values")


def _matrix(rows: Sequence[tuple[str | None, dict[str, Any]]], label: str) -> str:
    named = any(key is not None for key, _ in rows)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    places = {group: i for i, group in reversed(list(enumerate(c.split(".")[0] for c in columns)))}
    columns.sort(key=lambda c: places[c.split(".")[0]])
    head = ["", *columns] if named else columns
    body = [[*([key] if named else []), *(row.get(c, "") for c in columns)] for key, row in rows]
    return parts.table(head, body, label)


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings joined into one: `variant.chunks`."""
    made: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            made |= flat(inner, f"{prefix}{key}.")
        else:
            made[prefix + key] = inner
    return made


def _many(value: Any) -> bool:
    return isinstance(value, list) and len(value) > FEW and all(isinstance(v, dict) for v in value)


def _nested(value: dict[str, Any]) -> bool:
    return any(
        isinstance(v, dict) or (isinstance(v, list) and not parts.is_series(v)) for v in value.values()
    )


def _plain_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= parts.LONG_SERIES
        and not any(isinstance(v, (dict, list)) for v in value)
    )


def _rows_with(value: Any, key: str) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else value
    return isinstance(rows, list) and bool(rows) and all(isinstance(r, dict) and key in r for r in rows)


def _pair(value: Any) -> tuple[float, float] | None:
    return (value[0], value[-1]) if parts.is_series(value) else None


def _variant(options: dict[str, Any]) -> str:
    if options.get("method") == "adamw":
        return "AdamW, full"
    rest = [f"{k} {v}" for k, v in options.items() if k not in ("method", "chunks")]
    return ", ".join([f"K={options.get('chunks')}", *rest])


def scalars(value: Any) -> Iterator[Any]:
    """Every scalar below a JSON value."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from scalars(inner)
    else:
        yield value
