"""What a report shows of active runs: the curve, the rounds, revisions side by side. Markup: `active.html.j2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from qcrd_fast.report.active_view import ActiveView, curves
from qcrd_fast.report.charts import Spot, curve_chart
from qcrd_fast.report.pieces import color_of, entry, share_text
from qcrd_fast.utils.config_files import number

SHOWN = 6  # revisions of a run
KINDS = ("kept", "no fault", "fault missed", "another answer", "unreadable verdict", "no answer")  # in this order


def active_context(views: Sequence[ActiveView]) -> dict[str, Any]:
    """What `active.html.j2` shows of these runs."""
    runs = [
        {"name": view.name, "strategy": view.strategy, "state": view.state, "revisions": _revisions(view)}
        for view in views
    ]
    return {"curve": _curve(views), "rounds": _rounds(views), "runs": runs}


def _curve(views: Sequence[ActiveView]) -> dict[str, Any]:
    """Chart and legend of accuracy against tokens; empty before a round is done."""
    found = curves(views)
    if not found:
        return {}
    drawn, legend = [], []
    for i, (strategy, points) in enumerate(found.items()):
        drawn.append([Spot(p.tokens, p.accuracy, color_of(i)) for p in points])
        last = points[-1]
        low, high = last.accuracy[1:]
        text = f"{strategy}: {last.accuracy[0]:.3f} ({low:.3f} to {high:.3f}) after {last.tokens[0]:,.0f} tokens"
        legend.append(entry(color_of(i), f"{text}, {last.seeds} run{'s' if last.seeds > 1 else ''}"))
    chart = curve_chart("t0", drawn, title="Accuracy against teacher tokens", x_label="teacher tokens")
    return {"chart": Markup(chart), "legend": legend}


def _rounds(views: Sequence[ActiveView]) -> list[dict[str, Any]]:
    rows = []
    for view in views:
        for at, found in enumerate(view.rounds):
            record = found.record
            cells = [
                view.name if not at else "",
                at,
                f"{record['by']}, {record.get('revise')}" if record.get("by") else "the initial student",
                record.get("asked"),
                _counts(record.get("results")),
                share_text(record.get("no_fault_share")),
                _counts(record.get("tokens_round")),
                record.get("tokens"),
                _nll(record),
            ]
            best, accuracy = view.results.get("best_round") == at, share_text(record.get("accuracy_validation"))
            rows.append({"cells": cells, "accuracy": accuracy, "best": best})
    return rows


def _counts(found: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items()) if isinstance(found, dict) else ""


def _nll(record: dict[str, Any]) -> str:
    kept, own = (number(record.get(f"mean_nll_{name}")) for name in ("kept", "explanation"))
    return "" if kept is None else f"{kept:.3f}" + (f" / {own:.3f}" if own is not None else "")


def _revisions(view: ActiveView) -> list[tuple[str, list[tuple[str, str]]]]:
    """(question, what was said about it in turn) of a few: the student's explanation, the verdict, what came of it."""
    rows = [row for found in reversed(view.rounds) for row in found.revisions]
    rows.sort(key=lambda row: KINDS.index(row["result"]) if row.get("result") in KINDS else len(KINDS))  # stable
    articles = []
    for row in _of_each(rows):
        sides = [("the student", f"{row.get('explanation') or ''}\nAnswer: {row.get('explained_answer')}")]
        if wrong := row.get("wrong_step"):
            verdict = f"step {wrong} of {row.get('steps')} is wrong: {row.get('critique') or 'no reason given'}"
            sides.append(("the teacher's verdict", verdict))
        came = f"{row.get('text') or '(none)'}\nAnswer: {row.get('answer')}"
        sides.append((f"{row.get('mode')}: {row.get('result')}", came))
        articles.append((f"question {row.get('id')}", sides))
    return articles


def _of_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few rows, of each result one before any has two."""
    by_result: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_result.setdefault(str(row.get("result")), []).append(row)
    found: list[dict[str, Any]] = []
    for at in range(SHOWN):
        found += [some[at] for some in by_result.values() if len(some) > at]
    return found[:SHOWN]
