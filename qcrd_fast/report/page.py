"""`report`: one self-contained HTML page about runs: no network, no script, inline SVG charts.

What a section shows is computed here, its markup is in `page.html.j2`. Every text that comes from a run is escaped, and
the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import question_text
from qcrd_fast.discriminator.metrics import score_report
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.quality.cases import teacher_cases
from qcrd_fast.quality.judges import JUDGES, make_judge
from qcrd_fast.quality.samples import load_samples
from qcrd_fast.report.active_page import active_context
from qcrd_fast.report.active_view import ActiveView, is_active, read_active
from qcrd_fast.report.charts import PALETTE, Bar, Line, Spot, bar_chart, density_chart, line_chart, scatter_chart
from qcrd_fast.report.costs import OF_STEPS, Outcome, of_csv, of_view, points
from qcrd_fast.report.groups import group_rows
from qcrd_fast.report.pieces import color_of, entry, render_template, share_text
from qcrd_fast.report.run_view import MEASURES, RunView, negatives, read_run
from qcrd_fast.runs.folder import NEGATIVES, negatives_name
from qcrd_fast.utils.config_files import number
from qcrd_fast.utils.files import write_text
from qcrd_fast.utils.intervals import wilson
from qcrd_fast.version import __version__

SAMPLES, ANSWERS = 6, 8  # questions shown a run
KINDS = ("teacher positive", "teacher minority")  # the rest is the student's
MAX_KINDS = 24  # drawn of a run
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
    several = len(views) > 1
    return render_template(
        "page.html.j2",
        title=names[0] if len(names) == 1 and not rows else f"{len(names) + len(rows)} runs",
        version=__version__,
        runs=_runs(views) if views else {},
        reasoning=_reasoning(views),
        active=active_context(active) if active else {},
        costs=_costs([*(one for view in views if (one := of_view(view))), *rows]),
        curves=_curves(views),
        views=[
            {
                "title": view.title,
                "path": view.path,
                "groups": group_rows(view.results),
                "discriminator": _discriminator(view),
                "densities": _densities(view, i),
                "samples": _samples(view),
                "answers": _answers(view),
            }
            for i, view in enumerate(views)
            if not several or view.steps or view.scores or view.predictions  # the table says what has nothing yet
        ],
    )


# ---- sections ----


def _runs(views: Sequence[RunView]) -> dict[str, Any]:
    """{rows: one a run, with accuracy and options; shared: options that all runs have}."""
    switches = [view.switches() for view in views if view.config]
    shared = [switch for switch in (switches[0] if switches else ()) if all(switch in found for found in switches)]
    rows = []
    for i, view in enumerate(views):
        results = view.results
        share, n, asked = number(results.get("accuracy")), results.get("n"), results.get("n_zero_shot")
        known = share is not None and 0 <= share <= 1 and isinstance(n, int) and n > 0
        method, scheme, seed = (view.option(name) if view.config else "" for name in ("method", "scheme", "seed"))
        rows.append(
            {
                "color": color_of(i),
                "title": view.title,
                "accuracy": share_text(share),
                "interval": "{:.3f} to {:.3f}".format(*wilson(share, n)) if known else "",  # type: ignore[arg-type]
                "n": n,
                "on": results.get("evaluated_on"),
                "method": method,
                "scheme": scheme if method == "qcrd" else None,
                "switches": [switch for switch in view.switches() if switch not in shared],
                "state": view.state,
                "seed": seed,
                "steps": int(view.steps[-1]["step"]) if view.steps else 0,
                "validation": share_text(
                    results.get("accuracy_validation"), max(view.series("eval_accuracy")[1], default=None)
                ),
                "untrained": share_text(results.get("accuracy_untrained")),
                "zero_shot": share_text(results.get("accuracy_zero_shot")),
                "zero_shot_of": asked if type(asked) is int and asked != n else None,
            }
        )
    return {"rows": rows, "shared": shared}


def _curves(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """A card a figure of `CURVES` of which something is logged."""
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
            cards.append({"title": title, "chart": Markup(chart), "caption": "; ".join(legend)})
    return cards


def _reasoning(views: Sequence[RunView]) -> dict[str, Any]:
    """Chart and legend of answers and reasoning; empty if no run's reasoning was judged."""
    told = [view for view in views if number(view.results.get("sound_reasoning")) is not None]
    if not told:
        return {}
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
    return {"chart": Markup(chart), "legend": [entry(color, name) for *_, color, name in students]}


def _costs(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Charts of accuracy against time; empty if no run has a time."""
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
            legend.append(entry(color_of(i), text))
        svg = scatter_chart(f"a{number_}", spots, title=f"Accuracy against {chart.axis}", x_label=chart.axis)
        title = f"{chart.title}: {found[0].accuracy.questions} questions, {chart.device}"
        cards.append({"title": title, "chart": Markup(svg), "legend": legend})
    if not cards:
        return {}
    of_steps = [chart.axis.endswith(OF_STEPS) for chart in charts]
    axes = " and ".join(dict.fromkeys(chart.axis for chart in charts))
    return {"cards": cards, "axes": axes, "of_steps": any(of_steps), "of_wall": not all(of_steps)}


def _discriminator(view: RunView) -> str:
    """The discriminator's results on unseen questions, and whether it was rejected; empty if there are none."""
    value, low = (view.series(name)[1] for name in ("discriminator_auc", "discriminator_auc_low"))
    least = number(view.option("discriminator_min_auc")) or 0.0
    refused = view.results.get("discriminator_refused") is True or bool(low and low[-1] < least)
    if not low and not refused:
        return ""
    text = f"held-out AUC {value[-1]:.3f}, lower bound {low[-1]:.3f}" if value and low else "held-out AUC unknown"
    if not refused:
        return f"{text}; in use"
    return f"{text}; rejected (the lower bound must reach {least:g}); the vote weighs the rationales instead"


def _densities(view: RunView, index: int) -> dict[str, Any]:
    """Chart, legend and text of the quality scores by kind; empty if there are none."""
    stored = view.scores or _scores_by_votes(view)
    if not stored:
        return {}
    groups: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for record in stored:
        groups.setdefault(_kind(record), []).append(record["score"])
    found = [(kind, scores) for kind, scores in groups.items() if scores]
    found, left_out = found[:MAX_KINDS], len(found[MAX_KINDS:])
    colors = dict(zip(groups, itertools.cycle(KIND_COLORS), strict=False))
    chart = density_chart(
        f"d{index}", [(scores, colors[kind]) for kind, scores in found], title="Densities of quality scores"
    )
    legend = [
        entry(colors[kind], f"{kind}: n {len(scores)}, mean {sum(scores) / len(scores):.3f}") for kind, scores in found
    ]
    rows = [r for r in stored if r["kind"] in KINDS]
    told = score_report(
        [r["score"] for r in rows], [r["kind"] == KINDS[0] for r in rows], [str(r.get("id")) for r in rows]
    )
    text = "Densities by kind, as in the paper's Fig. 6."
    if left_out:
        text += f" {left_out} more kinds are left out."
    if not view.scores:
        text += " The student's are its last iteration's negatives."
    if told["auc"] is not None and told["auc_95"]:
        low, high = told["auc_95"]
        text += (
            f" Teacher positives against its minority: AUC {told['auc']:.3f} (95% interval {low:.3f} to {high:.3f} "
            f"over {told['questions']} questions), expected calibration error {told['expected_calibration_error']:.3f}."
        )
    return {"chart": Markup(chart), "legend": legend, "text": text}


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


def _samples(view: RunView) -> dict[str, Any]:
    """{pairs: questions with a teacher's positive beside the student's text; note: where the student's are from}."""
    pairs = list(itertools.islice(_scored_pairs(view), SAMPLES))
    if pairs:
        return {"pairs": pairs, "note": ""}
    iteration, said = negatives(view.path)
    pairs = list(itertools.islice(_negative_pairs(view, said), SAMPLES))
    return {"pairs": pairs, "note": f"The student's are the negatives of iteration {iteration}." if pairs else ""}


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


def _answers(view: RunView) -> dict[str, Any]:
    """Counts of right and wrong answers, and rows of a few; empty if none are stored."""
    rationales = view.rationales
    predictions = sorted(view.predictions, key=lambda p: str(p.get("id")) not in rationales)
    wrong = [p for p in predictions if p.get("correct") is False]
    right = [p for p in predictions if p.get("correct") is True]
    if not wrong and not right:
        return {}
    shown = [*wrong[: max(ANSWERS // 2, ANSWERS - len(right))], *right]
    rows = [
        (
            "right" if p["correct"] else "wrong",
            p.get("gold"),
            p.get("prediction"),
            p.get("question", ""),
            p.get("output", ""),
            rationales.get(str(p.get("id")), ""),
        )
        for p in shown[:ANSWERS]
    ]
    unreadable = sum(p.get("prediction") is None for p in wrong)
    return {"right": len(right), "wrong": len(wrong), "unreadable": unreadable, "rows": rows}
