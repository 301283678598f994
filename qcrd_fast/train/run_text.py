"""Text output of a run: a training example, progress lines, sample rationales, the final summary."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.models.prompts import Prompter, TokenIds
from qcrd_fast.train.methods import method_of
from qcrd_fast.utils.files import printable
from qcrd_fast.utils.intervals import wilson

if TYPE_CHECKING:
    from qcrd_fast.train.examples import Candidate, Example

LONGEST = 600  # characters of a question, rationale or answer that are printed


# ---- the start ----


def example_text(example: Example, student: Prompter, config: TrainConfig) -> str:
    """Format one training example as the student sees it, special tokens included; only targets have loss."""
    tasks = [("answer", example.predict, [("target", example.label)])]
    if candidates := _taught(example, config):
        sides = {True: "positive", False: "negative"}
        targets = [(f"target, {c.source} ({sides[c.positive]})", c.tokens) for c in candidates]
        tasks.append(("rationale", example.explain, targets))
    if example.reason:
        tasks.append(("reasoning", example.reason[0], [("target", example.reason[1])]))
    where = "for the encoder" if student.is_encoder_decoder else "before each target, masked"
    lines = [
        f"a training example, question {printable(example.id)}, as the student sees it (loss on the targets alone):"
    ]
    for task, prompt, targets in tasks:
        lines += [f"  {task}, prompt, {len(prompt)} tokens {where}:", *_barred(student, prompt)]
        for name, tokens in targets:
            cut = "" if tokens and tokens[-1] == student.tokenizer.eos_token_id else ", cut at --max-target-length"
            lines += [f"  {task}, {name}, {len(tokens)} tokens{cut}:", *_barred(student, tokens)]
    return "\n".join(lines)


def _taught(example: Example, config: TrainConfig) -> list[Candidate]:
    """The rationales that the method may train on, but for the student's own, which are not drawn yet."""
    method = method_of(config)
    if method.contrastive:
        return example.candidates({})
    if method.mutual_information:
        return list(example.positives[:1])
    of_positives, of_minority = method.weights(1.0, len(example.positives), len(example.minority))
    return [*example.positives[: len(of_positives)], *example.minority[: len(of_minority)]]


def _barred(student: Prompter, tokens: TokenIds) -> list[str]:
    text = student.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [f"    | {printable(line)}" for line in text.split("\n")]


# ---- while it trains ----


def progress_line(record: Mapping[str, Any], short: bool = False) -> str:
    """Format loss parts, active hinges, learning rate and speed of a metrics record; `short`: three of them."""
    if short:
        return f"loss {record['loss']:.3f}, lr {record['lr']:.2g}, {record['tokens_per_s']:,.0f} tok/s"
    parts = [f"{name} {record[key]:.3f}" for name, key in _PARTS if record.get(key) is not None]
    hinges = [f"{name} {record[key]:.0%}" for name, key in _HINGES if record.get(key) is not None]
    found = [
        f"loss {record['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else ""),
        *([f"active hinges: {', '.join(hinges)}"] if hinges else []),
        f"lr {record['lr']:.3g}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
    ]
    return "; ".join(found)


_PARTS = (
    ("answers", "loss_pred"),
    ("rationales", "loss_cl"),
    ("discriminator", "loss_d"),
    ("KL to the teacher", "teacher_kl"),
)
_HINGES = (("lagged", "active_hinge_lagged"), ("minority", "active_hinge_minority"))


def duration(seconds: float) -> str:
    """Such as 8 s, 3:25 or 12:03:25 (hours, minutes, seconds)."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{whole} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rationales_text(
    questions: Sequence[Question], rationales: Sequence[str], answers: Iterable[Mapping[str, Any]]
) -> str:
    """Format the student's rationales of some validation questions; `answers` are the records of their answers."""
    lines = []
    for question, rationale, record in zip(questions, rationales, answers, strict=True):
        right = "right" if record["correct"] else f"wrong, it is {_flat(record['gold'])}"
        lines += [
            f"  question {printable(question.id)}: {_flat(question_text(question), end=True)}",
            f"    the student explains: {_flat(rationale) or '(nothing)'}",
            f"    and answers: {_flat(record['output']) or '(nothing)'} ({right})",
        ]
    return "\n".join(lines)


def _flat(text: str, end: bool = False) -> str:
    """Return one printable line of at most `LONGEST` characters: the first ones, or with `end` the last ones."""
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = f"... {line[-LONGEST:]}" if end else f"{line[:LONGEST]} ..."
    return printable(line)


# ---- the end ----


def accuracy_text(right: int, n: int, more: str = "") -> str:
    """Such as `0.763 (95% interval 0.712 to 0.808; 229 of 300)`; `more` is put before the bracket closes."""
    low, high = wilson(right / n, n)
    return f"{right / n:.3f} (95% interval {low:.3f} to {high:.3f}; {right} of {n}{more})"


def summary_text(results: Mapping[str, Any], config: TrainConfig) -> str:
    """Format a finished run: folder, accuracy with its interval, and likely next commands."""
    run, n = str(config.output_dir).rstrip("/") or "/", results["n"]
    line = f"run folder {printable(run)}"
    if n:
        kind = f" {results.get('evaluated_on', '')} questions"
        line += f": accuracy {accuracy_text(round(results['accuracy'] * n), n, kind)}"
    folder, page, model = (shlex.quote(name) for name in (run, f"{run}/report.html", f"{run}-model"))
    data = shlex.quote(config.test_data) if config.test_data else "FILE"
    commands = (
        f'generate {folder} "A question?"',
        f"eval {folder} --data {data}",
        f"report {folder} --output {page}",
        f"export {folder} --output {model}",
    )
    return "\n".join([line, "next:", *(f"  qcrd-fast {command}" for command in commands)])
