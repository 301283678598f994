"""`active`: score the pool, ask the teacher about the best questions, train, evaluate, repeat, until asking no longer
pays.

After ELAD (arXiv 2402.13098), of which only the abstract and the captions could be had; formulas and prompts ours.
Every stage of a round ends in a file that is there whole or not at all (`folder`), and is a function of those before
it: a run that was killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.active import asking, student
from qcrd_fast.active.folder import (
    ASKED,
    EXPLANATIONS,
    LEDGER,
    LOG,
    PICKED,
    PREDICTIONS,
    RESULTS,
    REVISIONS,
    ROUND,
    ROWS,
    TRAIN,
    read_json,
    read_jsonl,
    round_path,
)  # fmt: skip
from qcrd_fast.active.ledger import ActiveLedger
from qcrd_fast.active.options import ActiveConfig
from qcrd_fast.active.picking import needs_explanations, pick
from qcrd_fast.active.revision import KEPT, NO_FAULT, Explanation, Outcome, to_question
from qcrd_fast.active.setup import Setup
from qcrd_fast.data.load import to_row
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.evaluate import accuracy, predict
from qcrd_fast.models.prompts import with_views
from qcrd_fast.models.student import Student
from qcrd_fast.runs.folder import RunFolder
from qcrd_fast.runs.load import find_model, find_state, load_student
from qcrd_fast.runs.logs import logging_to
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.device import choose_threads, make_autocast, resolve_device, threads_kept
from qcrd_fast.utils.files import printable, remove_tree, require_writable, write_json, write_lines
from qcrd_fast.utils.intervals import wilson
from qcrd_fast.utils.signals import StopSignals

log = logging.getLogger(__name__)


def run_active(config: ActiveConfig, options: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
    """Run, or go on with, an active run; returns what its `eval_results.json` holds, `stopped` saying why it ended.

    `options` are those of `train`, with student, eval_data, test_data and output_dir of the whole run. A `dry_run`
    checks everything, writes nothing and returns the plan.

    Raises:
        InputError: a file or option at fault, a folder that holds something without `resume`, or another run's.
        RunError: training fails, or the teacher cannot be asked.
        Stopped: after a signal, with everything saved.
    """
    run = ActiveRun(config, options)
    if dry_run:
        require_writable(run.path, "--output-dir")
        return run.plan()
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir: cannot write to {printable(run.path)}: {error.strerror}") from error
    held = sorted(p.name for p in run.path.iterdir() if p.name not in (LEDGER, LOG))
    if (held or _size(run.path / LEDGER)) and not run.base.resume:
        raise InputError(
            f"--output-dir: {printable(run.path)} is not empty ({(held or [LEDGER])[0]} is there); continue with "
            "--resume auto or choose another folder"
        )
    with ActiveLedger(run.path / LEDGER) as ledger, logging_to(run.path / LOG), threads_kept():
        try:
            return run.go(ledger)
        except OSError as error:
            raise RunError(f"{run.path}: {error}; what is there is intact, continue with --resume auto") from error


class ActiveRun(Setup):
    """An active run in progress."""

    def go(self, ledger: ActiveLedger) -> dict[str, Any]:
        self.check_same()
        if (done := read_json(self.path / RESULTS)) is not None:
            return dict(done)
        if self.teacher is not None and not self.teacher.revises and self.config.revise != "new":
            log.warning(
                "%s has no verdicts to look up, so its samples are taken as fresh rationales (--revise new)",
                self.config.teacher,
            )
        if not self.reasons:
            log.info(
                "the student was not trained to reason first: round 1 draws questions at random, for fresh rationales"
            )
        api = self.teacher.api if self.teacher else self.endpoint().api
        model = self.config.teacher_model or str(self.config.teacher)
        ledger.start(
            {"model": model, "api": api, "temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        )
        rounds = [self._begin()]
        stopped = None
        while stopped is None:
            rounds.append(self._round(len(rounds), rounds, ledger))
            self._prune(rounds)
            stopped = self._why_stop(rounds, ledger)
        return self._finish(rounds, stopped, ledger)

    def _begin(self) -> dict[str, Any]:
        """Round 0: the initial student, as it is."""
        folder = round_path(self.path, 0)
        if (found := read_json(folder / ROUND)) is not None:
            return dict(found)
        folder.mkdir(exist_ok=True)
        with StopSignals() as signals:
            record = {"round": 0, "model": None, "tokens": 0, **self._evaluate(self._load_student(None), folder)}
            _check(signals)
        write_json(folder / ROUND, record)
        log.info("the initial student: validation accuracy %.4f", record["accuracy_validation"])
        return record

    def _round(self, round: int, before: list[dict[str, Any]], ledger: ActiveLedger) -> dict[str, Any]:
        folder = round_path(self.path, round)
        if (found := read_json(folder / ROUND)) is not None:
            return dict(found)
        folder.mkdir(exist_ok=True)
        model = before[-1]["model"]
        asked = {row["id"] for r in range(1, round) for row in read_jsonl(round_path(self.path, r) / REVISIONS) or []}
        left = [q for q in self.pool if q.id not in asked]
        loaded: list[Student] = []

        def current() -> Student:  # loaded once, and only where a stage needs it
            if not loaded:
                loaded.append(self._load_student(model))
            return loaded[0]

        picked = self._pick(round, folder, left, current)
        rows, exhausted = self._ask(round, folder, picked, current, ledger)
        record = self._summary(round, rows, exhausted, ledger)
        log.info("round %d: %s", round, _round_text(record))
        loaded.clear()
        if record["positives"]:
            self._train(round, folder, model)
            record["model"] = f"{folder.name}/{TRAIN}"
        else:
            log.warning("round %d: nothing to learn was kept, so the student stays as it is", round)
            record["model"] = model
        with StopSignals() as signals:
            record |= self._evaluate(self._load_student(record["model"]), folder)
            _check(signals)
        write_json(folder / ROUND, record)
        log.info(
            "round %d: validation accuracy %.4f after %d teacher tokens",
            round,
            record["accuracy_validation"],
            record["tokens"],
        )
        return record

    def _pick(
        self, round: int, folder: Path, left: list[Question], current: Callable[[], Student]
    ) -> list[tuple[Question, Explanation]]:
        """The questions of the round with the student's explanation of each, in the order in which they are asked."""
        path, by_id = folder / PICKED, {q.id: q for q in left}
        by, mode = self.by(round), self.mode(round)
        said = {row["id"]: Explanation(row["text"], row["answer"]) for row in read_jsonl(folder / EXPLANATIONS) or []}
        if (found := read_json(path)) is None:
            with StopSignals() as signals:
                options = SelectOptions(
                    seed=self.base.seed, num_samples=self.config.num_samples,
                    num_continuations=self.config.num_continuations,
                    ifd_form=self.config.ifd_form, max_new_tokens=self.base.max_target_length, ask="reason",
                    impl=self.base.impl,
                )  # fmt: skip
                use = needs_explanations(by)
                if use and not said:
                    said = self._explain(folder, left, current())
                    _check(signals)
                scored = by != "random"
                chosen = pick(
                    left,
                    by,
                    self.config.top,
                    current() if scored else None,
                    options,
                    [said[q.id] for q in left] if use else None,
                )
                _check(signals)
                if mode != "new" and not use:
                    said = self._explain(folder, [q for q, _ in chosen], current())
                    _check(signals)
            found = {"by": by, "mode": mode, "ids": [q.id for q, _ in chosen], "scores": [score for _, score in chosen]}
            write_json(path, found)
        return [(by_id[id], said.get(id, Explanation("", None))) for id in found["ids"]]

    def _explain(self, folder: Path, questions: list[Question], current: Student) -> dict[str, Explanation]:
        found = student.explain(current, questions, batch_size=self.base.eval_batch_size, impl=self.base.impl)
        rows = [{"id": q.id, "text": e.text, "answer": e.answer} for q, e in zip(questions, found, strict=True)]
        write_lines(folder / EXPLANATIONS, rows)
        return dict(zip((q.id for q in questions), found, strict=True))

    def _ask(
        self,
        round: int,
        folder: Path,
        picked: list[tuple[Question, Explanation]],
        current: Callable[[], Student],
        ledger: ActiveLedger,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """(the rows of `revisions.jsonl`, what ended the asking early: budget, round, or None)."""
        path, mode = folder / REVISIONS, self.mode(round)
        rows = read_jsonl(path)
        if rows is not None:
            return rows, (read_json(folder / ASKED) or {}).get("exhausted")
        with StopSignals() as signals:
            talks = [asking.Conversation(round, q, e, mode, self.prompts, self.config.show) for q, e in picked]
            limits = asking.Limits(
                int(self.config.budget_tokens or 0), self.config.round_tokens, self.config.max_tokens
            )
            session = asking.Asking(round, ledger, limits, signals)
            if self.teacher is not None:
                session.hold(talks, self.teacher)
            else:
                asyncio.run(session.converse(talks, self.endpoint()))
            session.check_signals()
        outcomes = [t.outcome for t in talks if t.outcome is not None]
        self._add_nll(outcomes, current)
        write_json(folder / ASKED, {"exhausted": session.exhausted})
        write_lines(path, (outcome.to_dict() for outcome in outcomes))
        return [outcome.to_dict() for outcome in outcomes], session.exhausted

    def _add_nll(self, outcomes: Sequence[Outcome], current: Callable[[], Student]) -> None:
        """How likely the student finds what it is to learn, beside what it said itself."""
        kept = [o for o in outcomes if o.is_positive]
        if not kept:
            return
        by_id = {q.id: q for q in self.pool}
        asked = [(by_id[o.id], str(o.text), o.answer) for o in kept]
        own = [o for o in kept if o.explanation and o.explained_answer is not None]
        asked += [(by_id[o.id], o.explanation, o.explained_answer) for o in own]
        found = student.mean_nll(current(), asked, self.base.impl)
        for outcome, value in zip(kept, found, strict=False):
            outcome.nll = value
        for outcome, value in zip(own, found[len(kept) :], strict=True):
            outcome.nll_explanation = value

    def _summary(
        self, round: int, rows: list[dict[str, Any]], exhausted: str | None, ledger: ActiveLedger
    ) -> dict[str, Any]:
        outcomes = [Outcome(**row) for row in rows]
        results = Counter(o.result for o in outcomes)
        judged = [o for o in outcomes if o.judged]
        kept = [o for o in outcomes if o.result == KEPT]
        pairs = [(o.nll, o.nll_explanation) for o in kept if o.nll is not None and o.nll_explanation is not None]
        return {
            "round": round,
            "by": self.by(round),
            "revise": self.mode(round),
            "asked": len(outcomes),
            "positives": sum(o.is_positive for o in outcomes),
            "results": dict(sorted(results.items())),
            "judged": len(judged),
            "no_fault_share": results[NO_FAULT] / len(judged) if judged else None,
            "unreadable_explanations": sum(o.mode == "new" for o in outcomes) if self.mode(round) != "new" else 0,
            "mean_nll_kept": _mean([o.nll for o in kept if o.nll is not None]),
            "mean_nll_explanation": _mean([b for _, b in pairs]),
            "tokens_round": ledger.by_purpose(round),
            "tokens": ledger.before(round + 1),
            "exhausted": exhausted,
        }

    def _train(self, round: int, folder: Path, model: str | None) -> None:
        """Train on all that was kept so far; a run that is there is resumed."""
        rows = self._rows(round)
        if not (folder / ROWS).exists():
            write_lines(folder / ROWS, map(to_row, rows))
        student_of = find_model(self.model_path(model)) if self.config.continue_student else self.initial
        task = None if self.task == "mixed" else self.task
        config = dataclasses.replace(
            self.base, data=str(folder / ROWS), eval_data=None, test_data=None, output_dir=str(folder / TRAIN),
            resume="auto",
            student=student_of, task=task,
        )  # fmt: skip
        with RunFolder(config) as run:
            train(config, run)

    def _rows(self, round: int) -> list[Question]:
        by_id = {q.id: q for q in self.pool}
        found = []
        for r in range(1, round + 1):
            for row in read_jsonl(round_path(self.path, r) / REVISIONS) or []:
                outcome = Outcome(**row)
                if outcome.is_positive:
                    found.append(to_question(by_id[outcome.id], outcome))
        return found

    def _evaluate(self, loaded: Student, folder: Path) -> dict[str, Any]:
        """Accuracy on validation of a student that reasons first; its answers go to the round's folder."""
        records = self._predict(loaded, self.validation)
        write_lines(folder / PREDICTIONS, records)
        share = accuracy(records)
        return {
            "accuracy_validation": share,
            "n": len(records),
            "unreadable": sum(record["prediction"] is None for record in records),
        }

    def _predict(self, loaded: Student, questions: list[Question]) -> list[dict[str, Any]]:
        return predict(
            loaded, questions, self.task, batch_size=self.base.eval_batch_size, reasoning=True,
            autocast=make_autocast(loaded.device, self.base.bf16), impl=self.base.impl,
            batch_option="--eval-batch-size",
        )  # fmt: skip

    def _load_student(self, model: str | None) -> Student:
        """The student of a round, or the initial one, with the prompts of its training; where it had none, of this
        run."""
        name = self.model_path(model)
        if model is not None or find_state(name) is not None:
            loaded, _ = load_student(name, self.base.device)
            loaded.prompts = with_views(loaded.prompts, self.student_prompts.views)
        else:
            device = resolve_device(self.base.device)
            loaded = Student.load(name, self.student_prompts, device, self.base.attn_implementation)
            loaded.model.eval()
        choose_threads(loaded.device, sum(p.numel() for p in loaded.model.parameters()))
        return loaded

    def model_path(self, model: str | None) -> str:
        """Where the student of a record is: None is the initial one."""
        return self.initial if model is None else str(self.path / model)

    def _prune(self, rounds: list[dict[str, Any]]) -> None:
        """Delete the weights of rounds that are neither the best nor the last: they are large."""
        kept = {self._best(rounds)["model"], rounds[-1]["model"]}
        for record in rounds[1:]:
            folder = round_path(self.path, record["round"]) / TRAIN
            if record["model"] not in kept:
                for name in ("final", *sorted(p.name for p in folder.glob("checkpoint-*"))):
                    remove_tree(folder / name)

    # The end

    def _best(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        return max(rounds, key=lambda r: (r["accuracy_validation"], -r["round"]))

    def _why_stop(self, rounds: list[dict[str, Any]], ledger: ActiveLedger) -> str | None:
        config, last = self.config, rounds[-1]
        asked = sum(record.get("asked", 0) for record in rounds)
        if last["exhausted"] == "budget":
            return (
                f"budget: {ledger.total:,} of {config.budget_tokens:,} tokens are spent; the next request could pass it"
            )
        share = last["no_fault_share"]
        if config.no_fault_share is not None and share is not None and share >= config.no_fault_share:
            return (
                f"no fault: the teacher found none in {share:.0%} of the {last['judged']} explanations that it judged"
            )
        if config.flat_rounds is not None and len(rounds) > config.flat_rounds:
            values = [record["accuracy_validation"] for record in rounds]
            best = max(values[: -config.flat_rounds])
            if max(values[-config.flat_rounds :]) <= best:
                return f"flat: no validation of the last {config.flat_rounds} rounds was better than {best:.4f}"
        if asked >= len(self.pool):
            return f"pool: {asked} of {len(self.pool)} questions were asked"
        if not last["asked"]:
            if last["exhausted"]:
                return f"pool: --round-tokens {config.round_tokens} is less than a request may take"
            return f"pool: {asked} of {len(self.pool)} questions were asked, and no other has a score to be chosen by"
        return f"rounds: {config.rounds} are done" if last["round"] >= config.rounds else None

    def _finish(self, rounds: list[dict[str, Any]], stopped: str, ledger: ActiveLedger) -> dict[str, Any]:
        best = self._best(rounds)
        results: dict[str, Any] = {"accuracy": best["accuracy_validation"]}
        questions = self.test or self.validation
        with StopSignals() as signals:
            records = self._predict(self._load_student(best["model"]), questions) if self.test else None
            untrained = accuracy(self._predict(self._load_student(None), self.test)) if self.test else None
            _check(signals)
        if records is not None:
            results["accuracy"] = accuracy(records)
        totals = ledger.totals
        results |= {
            "accuracy_validation": best["accuracy_validation"],
            "accuracy_untrained": untrained if self.test else rounds[0]["accuracy_validation"],
            "n": len(questions),
            "accuracy_95": [round(bound, 6) for bound in wilson(results["accuracy"], len(questions))],
            "evaluated_on": "test" if self.test else "validation",
            "task": self.task,
            "stopped": stopped,
            "best_round": best["round"],
            "model": best["model"] or self.initial,
            "rounds": len(rounds) - 1,
            "asked": sum(r["asked"] for r in rounds[1:]),
            "positives": sum(r["positives"] for r in rounds[1:]),
            "results": dict(sum((Counter(r["results"]) for r in rounds[1:]), Counter())),
            "teacher_tokens": ledger.total,
            "tokens_by_purpose": ledger.by_purpose(),
            "requests_lost": totals.lost,
            "failures": dict(totals.failures),
        }
        if records is not None:
            write_lines(self.path / PREDICTIONS, records)
        else:
            shutil.copyfile(round_path(self.path, best["round"]) / PREDICTIONS, self.path / PREDICTIONS)
        write_json(self.path / RESULTS, results)
        log.info("stopped: %s", stopped)
        return results


def _check(signals: StopSignals) -> None:
    if signals.signum:
        raise Stopped(signals.signum)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _round_text(record: dict[str, Any]) -> str:
    """What the asking of a round came to, on one line."""
    results = ", ".join(f"{name} {count}" for name, count in record["results"].items()) or "nothing was asked"
    tokens = ", ".join(f"{name} {count:,}" for name, count in record["tokens_round"].items()) or "none"
    drift = ""
    if record["mean_nll_explanation"] is not None:
        kept, own = record["mean_nll_kept"], record["mean_nll_explanation"]
        drift = f"; kept revisions {kept:.3f} nats/token, the explanations {own:.3f}"
    return f"{record['asked']} questions by {record['by']}, {record['revise']}: {results}; tokens: {tokens}{drift}"
