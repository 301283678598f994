"""The sections of a report about active runs: the curve, the rounds, revisions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcrd_fast.report.active_view import ActiveView, curves
from qcrd_fast.report.charts import Spot, curve_chart
from qcrd_fast.report.pieces import chip, color_of, escaped, section, share_text
from qcrd_fast.utils.config_files import number

SHOWN = 6  # revisions of a run
KINDS = ("kept", "no fault", "fault missed", "another answer", "unreadable verdict", "no answer")  # in this order


def active_sections(views: Sequence[ActiveView]) -> list[str]:
    """HTML of the sections; none without a view."""
    if not views:
        return []
    found = [section("Accuracy against teacher tokens", _curve(views)), section("Rounds", _rounds(views))]
    for view in views:
        of_run = f": {escaped(view.name)}" if len(views) > 1 else ""
        found.append(section(f"Revisions side by side{of_run}", _revisions(view)))
    return found


def _curve(views: Sequence[ActiveView]) -> str:
    found = curves(views)
    if not found:
        return "<p>No round is done yet.</p>"
    drawn, legend = [], []
    for i, (strategy, points) in enumerate(found.items()):
        drawn.append([Spot(p.tokens, p.accuracy, color_of(i)) for p in points])
        last = points[-1]
        low, high = last.accuracy[1:]
        text = f"{strategy}: {last.accuracy[0]:.3f} ({low:.3f} to {high:.3f}) after {last.tokens[0]:,.0f} tokens"
        legend.append(
            f"<span>{chip(color_of(i))}{escaped(text)}, {last.seeds} run{'s' if last.seeds > 1 else ''}</span>"
        )
    chart = curve_chart("t0", drawn, title="Accuracy against teacher tokens", x_label="teacher tokens")
    note = (
        "A point is a round: validation accuracy of a student that reasons first, with its 95% interval over seeds and "
        "questions (of one run: over questions), against all tokens so far, prompts included."
    )
    figure = f'<figure class="card">{chart}<figcaption class="legend">{"".join(legend)}</figcaption></figure>'
    return f'<div class="grid">{figure}</div><p>{note}</p>'


def _rounds(views: Sequence[ActiveView]) -> str:
    names = (
        "run",
        "round",
        "by",
        "asked",
        "what came of them",
        "no fault",
        "tokens, by purpose",
        "tokens",
        "nll",
        "accuracy",
    )
    rows = []
    for view in views:
        for at, found in enumerate(view.rounds):
            record = found.record
            best = view.results.get("best_round") == at
            accuracy = share_text(record.get("accuracy_validation"))
            cells = [
                escaped(view.name) if not at else "",
                str(at),
                escaped(f"{record['by']}, {record.get('revise')}" if record.get("by") else "the initial student"),
                escaped(record.get("asked")),
                escaped(_counts(record.get("results"))),
                share_text(record.get("no_fault_share")),
                escaped(_counts(record.get("tokens_round"))),
                escaped(record.get("tokens")),
                _nll(record),
                f"<b>{accuracy}</b>" if best else accuracy,
            ]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    states = "".join(f"<p>{escaped(view.name)} ({escaped(view.strategy)}): {escaped(view.state)}</p>" for view in views)
    note = (
        "<p>nll: what the student finds a kept revision, and its own explanation, before it is trained on either "
        "[nats/token]. Bold: the best round.</p>"
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div>{states}{note}'


def _counts(found: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items()) if isinstance(found, dict) else ""


def _nll(record: dict[str, Any]) -> str:
    kept, own = (number(record.get(f"mean_nll_{name}")) for name in ("kept", "explanation"))
    return "" if kept is None else f"{kept:.3f}" + (f" / {own:.3f}" if own is not None else "")


def _revisions(view: ActiveView) -> str:
    """The transcript of a few questions: what the student said with its first wrong step marked, and what came of
    it."""
    rows = [row for found in reversed(view.rounds) for row in found.revisions]
    rows.sort(key=lambda row: KINDS.index(row["result"]) if row.get("result") in KINDS else len(KINDS))  # stable
    shown = _of_each(rows)
    if not shown:
        return "<p>Nothing was asked yet.</p>"
    articles = []
    for row in shown:
        wrong = row.get("wrong_step")
        verdict = (
            f"step {wrong} of {row.get('steps')} is wrong: {row.get('critique') or 'no reason given'}" if wrong else ""
        )
        said = [("the student", f"{row.get('explanation') or ''}\nAnswer: {row.get('explained_answer')}")]
        came = [
            (f"{row.get('mode')}: {row.get('result')}", f"{row.get('text') or '(none)'}\nAnswer: {row.get('answer')}")
        ]
        sides = [*said, *([("the teacher's verdict", verdict)] if verdict else []), *came]
        cards = "".join(
            f'<div class="card"><h4>{escaped(head)}</h4><p class="said">{escaped(text)}</p></div>'
            for head, text in sides
        )
        articles.append(f'<article><h3>question {escaped(row.get("id"))}</h3><div class="pair">{cards}</div></article>')
    return "".join(articles)


def _of_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few rows, of each result one before any has two."""
    by_result: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_result.setdefault(str(row.get("result")), []).append(row)
    found: list[dict[str, Any]] = []
    for at in range(SHOWN):
        found += [some[at] for some in by_result.values() if len(some) > at]
    return found[:SHOWN]
