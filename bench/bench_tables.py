"""Tables of docs/benchmarks.md from result files."""

from __future__ import annotations

from typing import Any

from .doc_tables import markdown


def scaling(result: dict[str, Any]) -> str:
    """Each point with its ratio to full AdamW, the theory's, and the gap."""
    body = []
    for row in result["points"]:
        point, step = row["point"], row["step"]
        body.append(
            [
                point["model"],
                str(point["chunks"]),
                str(point["interval"]),
                f"{point['batch']} x {point['tokens']}",
                f"{step['ratio']:.2f} ({step['low']:.2f} to {step['high']:.2f})",
                f"{row['step_theory']:.2f}",
                f"{100 * row['step_gap']:+.0f} %",
                f"{row['bytes_share']['gradients']:.3f}",
                f"{row['bytes_share']['state']:.3f}",
                f"{row['bytes_theory']:.3f}",
            ]
        )
    head = ("model", "K", "T", "tokens", "step / AdamW's", "theory", "gap", "gradients", "state", "theory")
    return markdown(head, body)


def peers(result: dict[str, Any]) -> str:
    """Each method with its figures, or with the reason why there are none."""
    body = []
    for name, row in result["methods"].items():
        if "error" in row:
            body.append([name, row["error"].replace("|", "/"), "", "", ""])
            continue
        over = row.get("over_base")
        time = f"{over['ratio']:.2f} ({over['low']:.2f} to {over['high']:.2f})" if over else row["step_error"]
        body.append(
            [
                name,
                time,
                f"{row['training_bytes'] / 2**20:.0f}",
                f"{row['final_loss']:.3f}",
                f"{row['rate']:g}",
            ]
        )
    return markdown(("method", "step / AdamW's", "MiB of training", "final loss", "best rate"), body)


def cross_entropy(result: dict[str, Any]) -> str:
    """Peak memory of each loss by the logits' size, and its time by that of plain logits."""
    body = []
    for name, row in result["methods"].items():
        if "error" in row:
            body.append([name, row["error"].replace("|", "/"), "", ""])
            continue
        peak, share = row["peak_bytes"] / 2**20, row["share_of_logits"]
        body.append([name, f"{peak:.1f}", f"{share:.3f}", f"{row['time_by_logits']:.2f}"])
    return markdown(("loss and gradients by", "peak, MiB", "x the logits", "time, x plain logits"), body)


def residency(result: dict[str, Any]) -> str:
    """Step and memory of each place that optimizer state can live in, beside full AdamW."""
    variants = result["variants"]
    full = variants["adamw"]["mean_ms"]
    body = []
    for name, row in variants.items():
        exposed = row.get("exposed_share")
        low, high = (quartile / full for quartile in row["quartiles_ms"])
        body.append(
            [
                "full AdamW" if name == "adamw" else name,
                f"{row['mean_ms'] / full:.2f} ({low:.2f} to {high:.2f})",
                f"{row['held_bytes']['gradients'] / 2**20:.1f}",
                f"{row['held_bytes']['state'] / 2**20:.1f}",
                "-" if exposed is None else f"{100 * exposed:.1f}",
            ]
        )
    head = ("state", "mean step / AdamW's (quartiles)", "gradients, MiB", "state, MiB", "exposed, %")
    return markdown(head, body)


def streamed(result: dict[str, Any]) -> str:
    """Step of each place of weights and update, what its copies cost, and the weights' bytes."""
    body = []
    for record in result["cases"].values():
        for place in ("resident", "host", "device"):
            if place not in record["variants"]:
                continue
            row, exposed = record["variants"][place], record["exposed"].get(place)
            kinds = record["bytes"][place]["device"].items()
            weights = sum(size for kind, size in kinds if kind.startswith(("weights", "leaves")))
            alone = record["variants"]["no compute"]["step_ms"]
            name = place if place == "resident" else f"streamed, update on the {place}"
            blocks = record["resident_blocks"]
            body.append(
                [
                    str(record["tokens"]),
                    name + (f", {blocks} blocks stay" if blocks and exposed else ""),
                    f"{row['step_ms']:.0f}",
                    f"{row['update_ms']:.0f}",
                    "-" if exposed is None else f"{row['moved_bytes'] / 2**20:.1f}",
                    "-" if exposed is None else f"{alone:.0f}",
                    "-" if exposed is None else f"{exposed['ms']:.0f}",
                    f"{weights / 2**20:.1f}",
                ]
            )
    head = (
        "tokens",
        "weights",
        "step, ms",
        "of it the update",
        "MiB up",
        "ms alone",
        "ms exposed",
        "weights on the device, MiB",
    )
    return markdown(head, body)
