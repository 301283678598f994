"""Deterministic SVG charts for an HTML page, axes in the page's text colour.

Needs matplotlib (the `report` extra). No text from the data goes into a chart: legends belong to the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qcrd_fast.errors import InputError

# Each reads on white and on near-black.
PALETTE = ("#2f7ed8", "#d9622b", "#2a9865", "#b05cc8", "#a97b0a", "#d64550", "#1796a3", "#7d838c")
MAX_POINTS = 400  # of a line; more are averaged
_INK = "#010203"  # stands for currentColor


class Line(NamedTuple):
    """Points of one series, with its colour and dash ("-", "--", ":")."""

    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = "-"


def line_chart(name: str, lines: Sequence[Line], *, title: str, x_label: str = "step", unit_range: bool = False) -> str:
    """An SVG of lines; `name` makes its ids its own, `unit_range` fixes the y axis to 0..1."""

    def plot(axes: Any) -> None:
        for line in lines:
            x, y = thin(line.x, line.y)
            marker = "o" if len(x) <= 30 else None
            axes.plot(x, y, color=line.color, linestyle=line.dash, linewidth=1.5, marker=marker, markersize=3)
        if unit_range:
            axes.set_ylim(-0.03, 1.03)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)

    return _svg(name, plot, title, x_label)


class Spot(NamedTuple):
    """A mean with its interval, across and upright, and its colour."""

    x: tuple[float, float, float]  # mean, low, high
    y: tuple[float, float, float]
    color: str


def scatter_chart(name: str, spots: Sequence[Spot], *, title: str, x_label: str) -> str:
    """An SVG of points with bars for their intervals; no value is below 0, where the x axis begins."""

    def plot(axes: Any) -> None:
        for (x, x_low, x_high), (y, y_low, y_high), color in spots:
            bars = dict(xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]])
            axes.errorbar([x], [y], **bars, color=color, fmt="o", markersize=5, elinewidth=1.3, capsize=2.5)
        axes.set_xlim(0, 1.08 * max(spot.x[2] for spot in spots) or 1)
        low, high = min(spot.y[1] for spot in spots), max(spot.y[2] for spot in spots)
        room = 0.12 * (high - low) or 0.05
        axes.set_ylim(max(low - room, -0.15 * room), high + room)

    return _svg(name, plot, title, x_label)


class Bar(NamedTuple):
    """A share with its interval, and its colour."""

    share: float
    low: float
    high: float
    color: str


def bar_chart(name: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str) -> str:
    """An SVG of shares, 0..1, side by side in each group, with its label and their intervals."""

    def plot(axes: Any) -> None:
        for at, (_, bars) in enumerate(groups):
            width = 0.8 / max(len(bars), 1)
            for i, bar in enumerate(bars):
                x = at - 0.4 + (i + 0.5) * width
                axes.bar(x, bar.share, 0.92 * width, color=bar.color)
                axes.plot([x, x], [bar.low, bar.high], color=_INK, linewidth=1.2)
        axes.set_xticks(range(len(groups)), [label for label, _ in groups])
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 1.03)

    return _svg(name, plot, title, "")


def curve_chart(name: str, curves: Sequence[Sequence[Spot]], *, title: str, x_label: str) -> str:
    """An SVG of lines through points with upright bars for their intervals; a curve has the colour of its first
    point."""

    def plot(axes: Any) -> None:
        for curve in curves:
            x, y = [spot.x[0] for spot in curve], [spot.y[0] for spot in curve]
            bars = [[spot.y[0] - spot.y[1] for spot in curve], [spot.y[2] - spot.y[0] for spot in curve]]
            options = dict(fmt="o-", markersize=4, linewidth=1.5, elinewidth=1.0, capsize=2.0)
            axes.errorbar(x, y, yerr=bars, color=curve[0].color, **options)
        axes.set_xlim(left=0)

    return _svg(name, plot, title, x_label)


def density_chart(name: str, groups: Sequence[tuple[Sequence[float], str]], *, title: str) -> str:
    """An SVG of densities of scores in [0, 1], each with its colour."""
    grid = np.linspace(0, 1, 201)

    def plot(axes: Any) -> None:
        for scores, color in groups:
            height = density(scores, grid)
            axes.plot(grid, height, color=color, linewidth=1.5)
            axes.fill_between(grid, height, color=color, alpha=0.12, linewidth=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)

    return _svg(name, plot, title, "quality score")


def density(scores: Sequence[float], grid: Any, bandwidth: float = 0.03) -> Any:
    """Return the Gaussian kernel density on `grid` of scores in [0, 1], reflected at both ends (total mass 1)."""
    values = np.asarray(scores, float)
    mirrored = np.concatenate([values, -values, 2 - values])
    height = np.zeros(len(grid))
    for start in range(0, len(mirrored), 4096):
        z = (grid[:, None] - mirrored[None, start : start + 4096]) / bandwidth
        height += np.exp(-0.5 * z * z).sum(1)
    return height / (len(values) * bandwidth * np.sqrt(2 * np.pi))


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[Any, Any]:
    """The points, or means over `MAX_POINTS` runs of neighbours."""
    x_P, y_P = np.asarray(x, float), np.asarray(y, float)
    if len(x_P) <= MAX_POINTS:
        return x_P, y_P
    parts = np.array_split(np.arange(len(x_P)), MAX_POINTS)
    return np.array([x_P[p].mean() for p in parts]), np.array([y_P[p].mean() for p in parts])


def _svg(name: str, plot: Any, title: str, x_label: str) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "report draws with matplotlib, which is not installed: pip install 'qcrd-fast[report]'"
        ) from error
    style = {
        **{
            key: _INK
            for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "grid.color")
        },
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "grid.linewidth": 0.8,
        "axes.formatter.limits": (-3, 5),
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # nothing of a matplotlibrc
        matplotlib.rcParams.update(style)  # type: ignore[arg-type]
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        axes.set_xlabel(x_label)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", text.partition(">")[0])
        + ">"
        + text.partition(">")[2]
    )
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL).replace(_INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()
