"""Pictures of the peers and of the scaling curves, drawn from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def peers(result: dict[str, Any], out: Path) -> None:
    """Step time, training memory and final loss of each method that passed, a panel each; the others are named."""
    from .plots import plt, save

    rows = {name: row for name, row in result["methods"].items() if "error" not in row}
    failed = [name for name in result["methods"] if name not in rows]
    names = list(rows)
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.9 + 0.28 * len(names)), sharey=True)
    panels = (
        ("ms a step", lambda row: row.get("median_ms", 0.0)),
        ("MiB of training, weights included", lambda row: row["training_bytes"] / 2**20),
        (f"loss after {result['settings']['steps']} steps", lambda row: row["final_loss"]),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        values = [value(rows[name]) for name in names]
        colours = ["tab:green" if name.startswith("chunkft") else "tab:gray" for name in names]
        axis.barh(names, values, color=colours)
        axis.set(xlabel=title)
        for number, height in enumerate(values):
            axis.text(height, number, f" {height:.3g}", va="center", fontsize=7)
        axis.margins(x=0.18)
    first = [rows[name]["final_loss"] for name in names] + [row["first_loss"] for row in rows.values()]
    axes[2].set_xlim(0.98 * min(first), 1.01 * max(first))
    axes[0].invert_yaxis()
    if failed:
        figure.suptitle("no numbers: " + ", ".join(failed), fontsize=7, y=0.02)
    save(figure, out)


def scaling(result: dict[str, Any], out: Path) -> None:
    """Measured ratios to full AdamW over each axis, beside the theory's line."""
    from .plots import plt, save

    rows = result["points"]

    def along(axis: str) -> list[dict[str, Any]]:
        rest = {k: v for k, v in result["base"].items() if k != axis}
        found = [row for row in rows if all(row["point"][k] == v for k, v in rest.items())]
        return sorted(found, key=lambda row: row["adamw_ms"] if axis == "model" else row["point"][axis])

    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2))
    titles = {"chunks": "K", "interval": "T", "tokens": "tokens a sequence", "model": "model"}
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        found = along(key)
        x = [str(row["point"][key]) for row in found]
        y = [row["step"]["ratio"] for row in found]
        error = [
            [max(0.0, row["step"]["ratio"] - row["step"]["low"]) for row in found],
            [max(0.0, row["step"]["high"] - row["step"]["ratio"]) for row in found],
        ]
        axis.errorbar(x, y, error, marker="o", color="tab:green", label="measured")
        axis.plot(x, [row["step_theory"] for row in found], "k--", label="theory")
        axis.set(xlabel=title, ylim=(0, 1.5))
        if found:
            gap = max(row["step_gap"] for row in found)
            axis.set_title(f"largest gap {gap:+.0%}", fontsize=8)
    axes[0].set_ylabel("step / AdamW's")
    axes[0].legend(fontsize=7)
    found = along("chunks")
    chunks = [row["point"]["chunks"] for row in found]
    for part in ("gradients", "state"):
        axes[4].loglog(chunks, [row["bytes_share"][part] for row in found], "o-", label=part)
    axes[4].loglog(chunks, [row["bytes_theory"] for row in found], "k--", label="theory 1/K")
    axes[4].set(xlabel="K", ylabel="bytes / AdamW's")
    axes[4].legend(fontsize=7)
    save(figure, out)


def kernels(result: dict[str, Any], out: Path) -> None:
    """Triton's and PyTorch's time by the roofline's over the rows of a slice: one panel a form, one colour a GPU.

    Of a file of predictions, the model's times; of measurements, the measured ones.
    """
    from .plots import plt, save

    predicted = result["kind"] == "predicted"
    forms = list(dict.fromkeys(case["form"] for case in result["records"].values()))
    figure, axes = plt.subplots(1, len(forms), figsize=(3.2 * len(forms), 3.2), sharey=True, squeeze=False)
    gpus = list(dict.fromkeys(case.get("gpu", result["device"]) for case in result["records"].values()))
    for axis, form in zip(axes[0], forms, strict=True):
        for number, gpu in enumerate(gpus):
            here = [
                case
                for case in result["records"].values()
                if case["form"] == form and case.get("gpu", result["device"]) == gpu
            ]
            here = [case for case in here if "triton_us" in case and "torch_us" in case]
            rows = [sum(case["rows"]) for case in here]
            ahead = [case["torch_us"] / case["triton_us"] for case in here]
            axis.scatter(rows, ahead, s=7, alpha=0.6, color=f"C{number}", label=gpu)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", title=form, xlabel="rows")
        axis.set_yticks([0.5, 0.7, 1.0, 1.4, 2.0], ["0.5", "0.7", "1", "1.4", "2"])
        axis.minorticks_off()
    axes[0][0].set_ylabel("PyTorch's time by Triton's" + (", PREDICTED" if predicted else ""))
    axes[0][-1].legend(fontsize=7)
    save(figure, out)
