"""Compare the cost model's predictions with what `bench.gpu` measured, for DIR/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import Case
from .model import MACHINE, REFUTED_ABOVE, show

GPUS = ("H100", "H200")  # the model is of their multiprocessors
NOT_MEASURED = "not measured"


def compare(results: Mapping[str, Mapping[str, Any]], device: str) -> list[dict[str, str]]:
    """Return a row for each design and head: predicted and measured percent of the peak, and the verdict.

    results: the content of each part's file, by name. device: the GPU's name.
    """
    measured = {**_of_tuning(results), **_of_counters(results)} if any(name in device for name in GPUS) else {}
    found = []
    for row in results.get("model", {}).get("rows", ()):
        if row["supposed"] or not row["limited"]:
            continue
        for head, shares in row["shares"].items():
            if shares is None:  # no room for this design
                continue
            way = row["tile"][head]
            share, by = measured.get((row["variant"], way, head), (None, ""))
            found.append({
                "design": row["design"],
                "tile": way,
                "head": head,
                "predicted": show(shares),
                "measured": NOT_MEASURED if share is None else f"{100 * share:.0f} ({by})",
                "verdict": "" if share is None else judge(share, shares, way),
            })  # fmt: skip
    return found


def judge(share: float, shares: Sequence[float], way: str) -> str:
    low, high = (min(each, MACHINE.cap) for each in shares)
    if way.startswith("128x128x") and not way.endswith(" resident") and share > REFUTED_ABOVE:
        return f"above {REFUTED_ABOVE:.0%}: refutes the model"
    return "below" if share < low - 0.005 else "above" if share > high + 0.005 else "as predicted"


def _of_tuning(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str, str], tuple[float, str]]:
    """Return {(variant, tile, head): (fraction of the peak, part)}, with the launch that joins the parts."""
    found = {}
    for part, result in results.items():
        for row in result.get("rows", ()) if part.startswith("tuning-") else ():
            if row["pass"] == "forward" and "ms" in row and row["dtype"] == "bf16":
                tflops = 2e-9 * Case(row["head"], row["tokens"]).unit / row["ms"]
                variant = "hidden resident" if row["way"].endswith(" resident") else "plain"
                found[variant, row["way"], row["head"]] = tflops / MACHINE.peak_tflops, part
    return found


def _of_counters(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str, str], tuple[float, str]]:
    rows = results.get("counters", {}).get("rows", ())
    return {
        ("plain", row["way"], row["head"]): (row["tflops"] / MACHINE.peak_tflops, "counters")
        for row in rows
        if "tflops" in row
    }


def page(parts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, str]], title: str) -> str:
    """Format the page as Markdown: one line per part, then predictions beside measurements."""
    lines = [f"# {title}", "", "| part | status | seconds | said |", "|---|---|---|---|"]
    lines += [f"| {row['part']} | {row['status']} | {row.get('seconds', '')} | {_cell(row['said'])} |" for row in parts]
    lines += ["", "## Forward pass: predicted and measured share of the peak", ""]
    lines += [
        f"Percent of {MACHINE.peak_tflops:.0f} bf16 TFLOP/s, of an H100 or H200; how it is predicted: docs/kernels.md.",
        "",
    ]
    lines += ["| design | tile | head | predicted | measured | verdict |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
