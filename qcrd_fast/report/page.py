"""`report`: one self-contained HTML page about runs: no network, no script, inline SVG charts.

Every text that comes from a run is escaped, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import question_text
from qcrd_fast.discriminator.metrics import score_report
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.quality.cases import teacher_cases
from qcrd_fast.quality.judges import JUDGES, make_judge
from qcrd_fast.quality.samples import load_samples
from qcrd_fast.report.active_page import active_sections
from qcrd_fast.report.active_view import ActiveView, is_active, read_active
from qcrd_fast.report.charts import PALETTE, Bar, Line, Spot, bar_chart, density_chart, line_chart, scatter_chart
from qcrd_fast.report.costs import OF_STEPS, Outcome, of_csv, of_view, points
from qcrd_fast.report.groups import groups_table
from qcrd_fast.report.pieces import card, chip, color_of, escaped, section, share_text, switch_spans
from qcrd_fast.report.run_view import MEASURES, RunView, negatives, read_run
from qcrd_fast.runs.folder import NEGATIVES, negatives_name
from qcrd_fast.utils.config_files import number
from qcrd_fast.utils.files import write_text
from qcrd_fast.utils.intervals import wilson
from qcrd_fast.version import __version__

SAMPLES, ANSWERS = 6, 8  # questions shown a run
KINDS = ("teacher positive", "teacher minority")  # the rest is the student's
KIND_COLORS = tuple(PALETTE[i] for i in (2, 4, 0, 3, 5, 6, 1, 7))
OF_STUDENT = {True: ", agrees with the majority", False: ", differs from it", None: ", no conclusion"}
# title, (field, dash, what it is), within 0..1
CURVES: tuple[tuple[str, tuple[tuple[str, str, str], ...], bool], ...] = (
    ("Validation accuracy", (("eval_accuracy", "-", ""),), True),
    ("Loss (Eq. 8)", (("loss", "-", ""),), False),
    ("Label task, L_pred", (("loss_pred", "-", ""),), False),
    ("Contrastive loss, L_cl (Eq. 3)", (("loss_cl", "-", ""),), False),
    ("Discriminator's loss, L_D (Eq. 2)", (("loss_d", "-", ""),), False),
    ("Mean quality score", (("quality_positive", "-", "positives"), ("quality_negative", "--", "negatives")), True),
    (
        "Mean weight of negatives",
        (
            ("weight_lagged_differs", "-", "student's that differ from the majority"),
            ("weight_lagged_agrees", "--", "student's that agree"),
            ("weight_minority", ":", "teacher's minority"),
        ),
        True,
    ),
    ("Share of the student's samples that agree with the majority", (("lagged_agrees", "-", ""),), True),
    (
        "Share of active hinges",
        (("active_hinge_lagged", "-", "student's negatives"), ("active_hinge_minority", "--", "teacher's minority")),
        True,
    ),
    ("Throughput [tokens/s]", (("tokens_per_s", "-", ""),), False),
)


def write_report(
    runs: Sequence[str], output: str, *, results: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Write the page about `runs` and the CSV `results` to `output`; return its content.

    Raises `InputError` for a run that is no folder, no run and no rows at all, an `output` that does not end in .html,
    or when matplotlib is missing; `RunError` when the page cannot be written.
    """
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output: {output} does not end in .html")
    if not target.parent.is_dir() or target.is_dir():
        raise InputError(f"--output: {output} is not a file in a folder that exists")
    each = list({Path(run).resolve(): run for run in reversed(runs)}.values())[::-1]  # once
    views = [read_run(run) for run in each if not is_active(Path(run))]
    active = [read_active(run) for run in each if is_active(Path(run))]
    rows = of_csv(results) if results else []
    if not views and not rows and not active:
        raise InputError(
            f"--results: {results} has no finished run" if results else "name a run folder, or --results FILE.csv"
        )
    for view in views:
        if [other.name for other in views].count(view.name) > 1:  # same names in several folders
            view.title = str(view.path)
    page = render(views, rows, active)
    if not dry_run:
        try:
            write_text(target, page)
        except OSError as error:
            raise RunError(f"cannot write {output}: {error.strerror or error}") from error
    return {
        "output": output,
        "rows": len(rows),
        "runs": [
            *(
                {"name": v.title, "state": v.state, "steps_logged": len(v.steps), "scores": len(v.scores)}
                for v in views
            ),
            *({"name": v.name, "state": v.state, "rounds": len(v.rounds) - 1, "scores": 0} for v in active),
        ],
        "bytes": len(page.encode("utf-8", "surrogatepass")),
    }


def render(views: Sequence[RunView], rows: Sequence[Outcome] = (), active: Sequence[ActiveView] = ()) -> str:
    """The page, a function of the views, and of rows of a CSV of runs, alone."""
    names = [*(v.title for v in views), *(v.name for v in active)]
    title = names[0] if len(names) == 1 and not rows else f"{len(names) + len(rows)} runs"
    body = [
        f"<header><h1>{escaped(title)}</h1><p>qcrd-fast {__version__}, quality-guided contrastive rationale "
        "distillation</p></header>",
        *([section("Runs", _table(views))] if views else []),
        *_reasoning(views),
        *active_sections(active),
        *_costs([*(one for view in views if (one := of_view(view))), *rows]),
        *([section("While training", _curves(views))] if views else []),
    ]
    for i, view in enumerate(views):
        if len(views) > 1 and not (view.steps or view.scores or view.predictions):
            continue  # the table says that there is nothing yet
        of_run = f": {escaped(view.title)}" if len(views) > 1 else ""
        body += [
            *(
                [section(f"By domain and view{of_run}", of_groups)]
                if (of_groups := groups_table(view.results, escaped))
                else []
            ),
            section(f"Quality scores{of_run}", _discriminator(view) + _densities(view, i)),
            section(f"Rationales side by side{of_run}", _samples(view)),
            section(f"Answers{of_run}", _answers(view)),
        ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)} · qcrd-fast</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---- sections ----


def _table(views: Sequence[RunView]) -> str:
    """Format a row a run: accuracy and options; options shared by all runs follow once."""
    switches = [view.switches() for view in views if view.config]
    shared = [switch for switch in (switches[0] if switches else ()) if all(switch in found for found in switches)]
    head = [
        "run",
        "accuracy",
        "n",
        "on",
        "method",
        "scheme",
        "switches",
        "state",
        "seed",
        "steps",
        "validation",
        "untrained",
        "zero-shot",
    ]
    rows = []
    for i, view in enumerate(views):
        share, n = number(view.results.get("accuracy")), view.results.get("n")
        span = ""
        if share is not None and 0 <= share <= 1 and isinstance(n, int) and n > 0:
            span = "<br><small>{:.3f} to {:.3f}</small>".format(*wilson(share, n))
        method, scheme, seed = (view.option(name) if view.config else "" for name in ("method", "scheme", "seed"))
        own = [switch for switch in view.switches() if switch not in shared]
        cells = [
            f"{chip(color_of(i))}<b>{escaped(view.title)}</b>",
            f"<b>{share:.3f}</b>{span}" if share is not None else "",
            escaped(n),
            escaped(view.results.get("evaluated_on")),
            escaped(method),
            escaped(scheme) if method == "qcrd" and scheme is not None else "",
            f'<div class="switches">{switch_spans(own)}</div>' if own else "",
            escaped(view.state),
            escaped(seed),
            str(int(view.steps[-1]["step"])) if view.steps else "0",
            share_text(view.results.get("accuracy_validation"), max(view.series("eval_accuracy")[1], default=None)),
            share_text(view.results.get("accuracy_untrained")),
            share_text(view.results.get("accuracy_zero_shot")) + _of_fewer(view.results.get("n_zero_shot"), n),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    names = "".join(f"<th>{name}</th>" for name in head)
    note = "<p>Accuracy: greedy answers of the final checkpoint, with Wilson's 95% interval.</p>"
    if shared:
        of_all = "Not at their defaults" + (", in all runs" if len(views) > 1 else "")
        note += f'<p class="switches">{of_all}: {switch_spans(shared)}</p>'
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _of_fewer(asked: Any, n: Any) -> str:
    """Says of how many questions a figure is, where it is not of all."""
    return f"<br><small>of {asked}</small>" if type(asked) is int and asked != n else ""


def _curves(views: Sequence[RunView]) -> str:
    cards = []
    for number_, (title, fields, unit_range) in enumerate(CURVES):
        lines, shown = [], set()
        for i, view in enumerate(views):
            for field, dash, what in fields:
                x, y = view.series(field)
                if x:
                    lines.append(Line(x, y, color_of(i), dash))
                    shown.add(what)
        if lines:
            legend = [
                f"{'solid' if dash == '-' else 'dashed'}: {what}" for _, dash, what in fields if what and what in shown
            ]
            chart = line_chart(f"c{number_}", lines, title=title, unit_range=unit_range)
            cards.append(card(title, chart, "; ".join(legend)))
    if not cards:
        return "<p>Nothing is logged yet.</p>"
    runs = (
        "".join(f"<span>{chip(color_of(i))}{escaped(v.title)}</span>" for i, v in enumerate(views))
        if len(views) > 1
        else ""
    )
    return (f'<p class="legend">{runs}</p>' if runs else "") + f'<div class="grid">{"".join(cards)}</div>'


def _reasoning(views: Sequence[RunView]) -> list[str]:
    """The section of answers and reasoning, or none where no run's reasoning was judged."""
    told = [view for view in views if number(view.results.get("sound_reasoning")) is not None]
    if not told:
        return []
    students = [(told[0], "_untrained", PALETTE[-1], "untrained")]
    students += [(view, "", color_of(views.index(view)), view.title) for view in told]
    groups = []
    for name, label in MEASURES.items():
        bars = []
        for view, suffix, color, _ in students:
            share, n = number(view.results.get(name + suffix)), view.results.get("n")
            if share is not None and 0 <= share <= 1 and isinstance(n, int) and n > 0:
                bars.append(Bar(share, *wilson(share, n), color))
        if bars:
            groups.append((label.replace(" after ", "\nafter "), bars))
    chart = bar_chart("b0", groups, title="Answers and reasoning")
    legend = "".join(f"<span>{chip(color)}{escaped(name)}</span>" for *_, color, name in students)
    note = (
        "<p>Shares of the test questions, with 95% intervals. Sound: every equation holds, every number comes from the "
        "question or an earlier result, and it ends in the gold answer.</p>"
    )
    figure = f'<figure class="card">{chart}<figcaption class="legend">{legend}</figcaption></figure>'
    return [section("Answers and reasoning", f'<div class="grid">{figure}</div>{note}')]


def _costs(outcomes: Sequence[Outcome]) -> list[str]:
    """Format accuracy against time; empty if no run has a time."""
    cards = []
    charts = points(outcomes)
    for number_, (chart, found) in enumerate(charts.items()):
        spots, legend = [], []
        for i, point in enumerate(found):
            told, minutes = point.accuracy, point.mean_minutes
            low, high = max(told.low, 0.0), min(told.high, 1.0)
            span = (minutes, min(point.minutes), max(point.minutes))
            spots.append(Spot(span, (told.mean, low, high), color_of(i)))
            runs = f"{len(point.minutes)} run{'s' if len(point.minutes) > 1 else ''}"
            shared = f", {point.parallel} at a time" if point.parallel > 1 else ""
            text = f"{point.label}: {told.mean:.3f} ({low:.3f} to {high:.3f}), {minutes:.3g} min, {runs}{shared}"
            legend.append(f"<span>{chip(color_of(i))}{escaped(text)}</span>")
        svg = scatter_chart(f"a{number_}", spots, title=f"Accuracy against {chart.axis}", x_label=chart.axis)
        title = escaped(f"{chart.title}: {found[0].accuracy.questions} questions, {chart.device}")
        cards.append(
            f'<figure class="card"><h3>{title}</h3>{svg}<figcaption '
            f'class="legend">{"".join(legend)}</figcaption></figure>'
        )
    if not cards:
        return []
    note = (
        "A point is the mean of a method's runs; upright its 95% interval over seeds and questions (of one run: over "
        "questions), across from the shortest run to the longest."
    )
    if any(chart.axis.endswith(OF_STEPS) for chart in charts):
        note += (
            " Minutes of the steps: the mean of those logged, times the steps, "
            "so without loading, validation and saving."
        )
    if any(not chart.axis.endswith(OF_STEPS) for chart in charts):
        note += " Minutes are those of the whole run on the wall, all attempts together."
    axes = " and ".join(dict.fromkeys(chart.axis for chart in charts))
    return [section(f"Accuracy against {axes}", f'<div class="grid">{"".join(cards)}</div><p>{note}</p>')]


def _discriminator(view: RunView) -> str:
    """Format the discriminator's results on unseen questions, and whether it was rejected."""
    value, low = (view.series(name)[1] for name in ("discriminator_auc", "discriminator_auc_low"))
    least = number(view.option("discriminator_min_auc")) or 0.0
    refused = view.results.get("discriminator_refused") is True or bool(low and low[-1] < least)
    if not low and not refused:
        return ""
    text = f"held-out AUC {value[-1]:.3f}, lower bound {low[-1]:.3f}" if value and low else "held-out AUC unknown"
    judged = (
        f"rejected (the lower bound must reach {least:g}); the vote weighs the rationales instead"
        if refused
        else "in use"
    )
    return f"<p>The discriminator, on questions that it was not trained on: {text}; {judged}.</p>"


def _densities(view: RunView, index: int) -> str:
    stored = view.scores or _scores_by_votes(view)
    if not stored:
        return (
            "<p>None are stored. The figure of the paper (Fig. 6) is drawn after<br>"
            f"<code>qcrd-fast score {escaped(view.path)} --data FILE --output scores.jsonl --sample-student "
            f"1.5,2.0</code></p>"
        )
    groups: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for record in stored:
        groups.setdefault(_kind(record), []).append(record["score"])
    found = [(kind, scores) for kind, scores in groups.items() if scores][: len(KIND_COLORS)]
    colors = {kind: KIND_COLORS[i] for i, kind in enumerate(groups) if i < len(KIND_COLORS)}
    chart = density_chart(
        f"d{index}", [(scores, colors[kind]) for kind, scores in found], title="Densities of quality scores"
    )
    legend = "".join(
        f"<span>{chip(colors[kind])}{escaped(kind)}: n {len(scores)}, mean {sum(scores) / len(scores):.3f}</span>"
        for kind, scores in found
    )
    rows = [r for r in stored if r["kind"] in KINDS]
    told = score_report(
        [r["score"] for r in rows], [r["kind"] == KINDS[0] for r in rows], [str(r.get("id")) for r in rows]
    )
    text = "Densities by kind, as in the paper's Fig. 6."
    if not view.scores:
        text += " The student's are its last iteration's negatives."
    if told["auc"] is not None and told["auc_95"]:
        low, high = told["auc_95"]
        text += (
            f" Teacher positives against its minority: AUC {told['auc']:.3f} (95% interval {low:.3f} to {high:.3f} "
            f"over {told['questions']} questions), expected calibration error {told['expected_calibration_error']:.3f}."
        )
    figure = f'<figure class="card">{chart}<figcaption class="legend">{legend}</figcaption></figure>'
    return f'<div class="grid">{figure}</div><p>{text}</p>'


def _kind(record: dict[str, Any]) -> str:
    """Name a score's kind; the student's by whether they agree with the majority, if known."""
    agrees = record.get("agrees", "")
    return record["kind"] + (OF_STUDENT[agrees] if agrees is None or isinstance(agrees, bool) else "")


def _scores_by_votes(view: RunView) -> list[dict[str, Any]]:
    """Recompute the scores of a run with vote or text quality from its data and last negatives."""
    qualities = [view.option(name) or view.option("quality") for name in ("positive_quality", "negative_quality")]
    data, (iteration, said) = view.config.get("data"), negatives(view.path)
    if view.option("method") != "qcrd" or not isinstance(data, str) or not {*qualities} <= {*JUDGES}:
        return []
    try:
        questions = load_questions(
            data, split="train", on_bad_row="skip", seed=int(number(view.option("seed")) or 0)
        ).questions
        samples = load_samples(view.path / NEGATIVES / negatives_name(iteration), questions).cases if said else {}
    except (InputError, OSError, ValueError):
        return []
    judges = {name: make_judge(name, questions) for name in {*qualities}}
    teacher = [case for q in questions for case in teacher_cases(q)]
    student = [case for cases in samples.values() for case in cases]
    found = []
    for name, kind, agrees, cases in (
        (qualities[0], KINDS[0], False, [case for case in teacher if case.positive]),
        (qualities[1], KINDS[1], False, [case for case in teacher if not case.positive]),
        (qualities[1], "student", True, student),
    ):
        for case, score in zip(cases, judges[name].scores(cases), strict=True):
            record = {"kind": kind, "id": case.question.id, "score": score}
            found.append(record | ({"agrees": case.agrees} if agrees else {}))
    return found


def _samples(view: RunView) -> str:
    """Format questions with a teacher's positive beside the student's text."""
    pairs = list(itertools.islice(_scored_pairs(view), SAMPLES))
    note = ""
    if not pairs:
        iteration, said = negatives(view.path)
        pairs = list(itertools.islice(_negative_pairs(view, said), SAMPLES))
        note = f"<p>The student's are the negatives of iteration {iteration}.</p>" if pairs else ""
    if not pairs:
        return "<p>No rationales of the student are stored in this run, or its training data cannot be read here.</p>"
    return note + "".join(
        f'<article><h3>{escaped(question)}</h3><div class="pair">'
        + "".join(
            f'<div class="card"><h4>{escaped(head)}</h4><p class="said">{escaped(text)}</p></div>'
            for head, text in sides
        )
        + "</div></article>"
        for question, sides in pairs
    )


def _scored_pairs(view: RunView) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    by_question: dict[str, dict[str, dict[str, Any]]] = {}
    for record in view.scores:
        by_question.setdefault(str(record.get("id")), {}).setdefault(record["kind"], record)
    for kinds in by_question.values():
        own = [kind for kind in kinds if kind not in KINDS]
        if KINDS[0] in kinds and own:
            shown = [kind for kind in KINDS if kind in kinds] + own
            sides = [(f"{kind}, score {kinds[kind]['score']:.3f}", str(kinds[kind].get("text", ""))) for kind in shown]
            yield str(kinds[KINDS[0]].get("question", "")), sides


def _negative_pairs(view: RunView, said: dict[str, str]) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    data = view.config.get("data")
    if not said or not isinstance(data, str):
        return
    try:
        questions = load_questions(
            data, split="train", on_bad_row="skip", seed=int(number(view.option("seed")) or 0)
        ).questions
    except (InputError, OSError, ValueError):
        return
    for question in questions:
        if question.id in said and question.positives:
            sides = [("teacher positive", question.positives[0].text), ("student negative", said[question.id])]
            yield question_text(question), sides


def _answers(view: RunView) -> str:
    rationales = view.rationales
    predictions = sorted(view.predictions, key=lambda p: str(p.get("id")) not in rationales)
    wrong = [p for p in predictions if p.get("correct") is False]
    right = [p for p in predictions if p.get("correct") is True]
    if not wrong and not right:
        return "<p>No predictions are stored.</p>"
    shown = [*wrong[: max(ANSWERS // 2, ANSWERS - len(right))], *right]
    rows = "".join(
        f"<tr><td>{'right' if p['correct'] else 'wrong'}</td><td>{escaped(p.get('gold'))}</td>"
        f"<td>{escaped(p.get('prediction'))}</td><td>{escaped(p.get('question', ''))}</td>"
        f"<td>{escaped(p.get('output', ''))}</td>"
        f"<td>{escaped(rationales.get(str(p.get('id')), ''))}</td></tr>"
        for p in shown[:ANSWERS]
    )
    unread = sum(p.get("prediction") is None for p in wrong)
    count = f"<p>{len(right)} right, {len(wrong)} wrong, of these {unread} without a readable answer; a few:</p>"
    names = ("", "gold", "read", "question", "output, as it is", "greedy rationale")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f'{count}<div class="wide"><table class="answers"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


STYLE = """
:root{--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--page:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4b0;--line:#343b44;--page:#111418;--card:#191e24}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:82rem;margin:0 auto;padding:1rem clamp(.8rem,3vw,2rem) 3rem}
h1{font-size:1.6rem;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:.95rem;margin:0 0 .4rem;overflow-wrap:anywhere}h4{font-size:.85rem;margin:0 0 .3rem;color:var(--soft)}
header p,section>p,figcaption{color:var(--soft);font-size:.87rem;margin:.4rem 0}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.87rem}
th,td{text-align:left;padding:.4rem .55rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{color:var(--soft);font-weight:600}tbody tr:last-child td{border-bottom:0}
td .switches{white-space:normal;min-width:14rem}
.switches span{display:inline-block;overflow-wrap:anywhere;max-width:100%;
font-family:ui-monospace,monospace;font-size:.8rem;margin-right:.6em}
.answers td:nth-child(n+4){white-space:pre-wrap;overflow-wrap:anywhere;min-width:13rem}
.grid{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
.card{margin:0;padding:.7rem .8rem;background:var(--card);border:1px solid var(--line);border-radius:6px;min-width:0}
.card svg{display:block;width:100%;height:auto}.card svg text{font-family:inherit!important}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem}.legend span{overflow-wrap:anywhere}
.chip{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.45em}
article{margin:0 0 1.3rem}
.pair{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}
.said{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:15rem;overflow-y:auto}
small{color:var(--soft)}
code{overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:4px;padding:.1em .3em}
"""
