"""Plot bench/results/loss.csv, the latest row of each provider: python bench/plot.py [FILE.png]"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "loss.csv"
OTHER = ("score", "every", "every-kept")  # modes that are no step of the contrastive loss
CASE = ("head", "tokens", "positives", "negatives", "logits", "dtype", "device")


def latest(path: Path) -> dict[str, dict[str, float]]:
    """Return {case: {provider: ms}} of the latest rows; wrong, failed and incomparable ones are left out."""
    cases: dict[str, dict[str, float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok" and row["mode"] not in OTHER:
                name = " ".join(row[field] for field in CASE)
                cases.setdefault(name, {})[f"{row['provider']} {row['mode']}"] = float(row["ms"])
    return cases


def main(output: str) -> None:
    import matplotlib.pyplot as plt

    cases = latest(RESULTS)
    figure, axes = plt.subplots(len(cases), 1, figsize=(8, 0.5 + 2.5 * len(cases)), squeeze=False, layout="constrained")
    for axis, (name, times) in zip(axes[:, 0], cases.items(), strict=True):
        order = sorted(times, key=times.__getitem__, reverse=True)
        bars = axis.barh(order, [times[provider] for provider in order])
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set(title=name, xlabel="ms, forward and backward")
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(RESULTS.with_suffix(".png")))
