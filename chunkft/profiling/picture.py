"""The picture of memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chunkft.profiling.ledger import CATEGORIES
from chunkft.profiling.timeline import Timeline

__all__ = ["draw_memory"]

COLOURS = {
    "weights": "#bdbdbd",
    "gradients": "#de2d26",
    "state": "#756bb1",
    "activations": "#3182bd",
    "other": "#fdae6b",
}
SHADES = {"forward": "#e5f5e0", "backward": "#fff7bc", "step": "#efedf5"}
MOST_LABELS = 12  # steps; of more they would lie upon each other
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def draw_memory(
    timeline: Timeline, process: Sequence[tuple[int, int]], path: Path, title: str, note: str
) -> None:
    """Draw bytes over time, stacked by category, phases shaded, the peak marked.

    Args:
        timeline: what to draw.
        process: times and bytes of a line to draw over it, such as the resident set; may be empty.
        path: the PNG to write.
        title: above the picture.
        note: what stands at the peak.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    peak_index, peak = timeline.peak()
    unit, name = next((u for u in UNITS if peak >= u[0]), (1, "B"))
    begin = min([int(timeline.times[0])] + [phase.start for phase in timeline.phases])
    end = max([int(timeline.times[-1])] + [phase.end for phase in timeline.phases])
    moments = np.append(timeline.times, end)
    seconds = (moments - begin) / 1e6
    # The level of a moment lasts until the next one.
    layers = [np.append(timeline.bytes[c], timeline.bytes[c][-1]) / unit for c in CATEGORIES]
    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=110)
    steps = len({phase.step for phase in timeline.phases})
    for phase in timeline.phases:
        axes.axvspan(
            (phase.start - begin) / 1e6,
            (phase.end - begin) / 1e6,
            color=SHADES[phase.name],
            linewidth=0,
            zorder=0,
        )
        if phase.name == "forward" and steps <= MOST_LABELS:
            text = f"step {phase.step}" + ("" if phase.chunk is None else f"\nchunk {phase.chunk}")
            axes.text(
                (phase.start - begin) / 1e6, 1.01, text, transform=axes.get_xaxis_transform(), fontsize=7
            )
    axes.stackplot(seconds, *layers, colors=[COLOURS[c] for c in CATEGORIES], step="post", zorder=2)
    handles = [Patch(color=COLOURS[c], label=c) for c in reversed(CATEGORIES)]
    handles += [Patch(color=shade, label=phase) for phase, shade in SHADES.items()]
    if process:
        times, values = zip(*process, strict=True)
        (line,) = axes.plot(
            (np.array(times) - begin) / 1e6,
            np.array(values) / unit,
            color="black",
            linewidth=1,
            linestyle=":",
            label="process",
            zorder=3,
        )
        handles.append(line)
    where = (int(timeline.times[peak_index]) - begin) / 1e6
    axes.plot([where], [peak / unit], "v", color="black", markersize=7, zorder=4)
    top = max([peak, *(value for _, value in process)]) / unit
    axes.set_ylim(0, 1.25 * top)
    axes.annotate(
        note,
        (where, peak / unit),
        xytext=(0.02, 0.97),
        textcoords="axes fraction",
        verticalalignment="top",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "linewidth": 0.6},
        zorder=5,
    )
    axes.set_xlim(0, (end - begin) / 1e6)
    axes.set(xlabel="milliseconds", ylabel=f"{name} held")
    axes.set_title(title, fontsize=10, pad=24)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
