"""Rows of named columns: a question with a list of samples, one sample, a worked solution, or nothing.

Alpaca, distilabel, open-r1, prompt and completion, multiple choice and the like differ in names alone; `fields.ROLES`
has these.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from qcrd_fast.data.answers import canonical
from qcrd_fast.data.formats import golds
from qcrd_fast.data.formats.fields import EXPLICIT_GOLDS, ROLES, Parsed, Row, plain
from qcrd_fast.data.formats.samples import (
    is_cut,
    is_reasoning,
    read_sample,
    row_is_cut,
    sample_list,
    with_reasoning,
)
from qcrd_fast.data.formats.turns import exchange, has_question, is_turns, reply_text, unwrap_template
from qcrd_fast.data.messages import with_thinking
from qcrd_fast.data.replies import DEFAULT, parse_choices
from qcrd_fast.data.schema import Question, Rationale, RowError, check_text, get_answer

_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")
_CONTRARY = " (where it ends in another answer than the gold)"
_TEXTS = ("completion", "rationale")
_EXPLICIT = {plain(name) for name in ROLES["gold"][:EXPLICIT_GOLDS]}


def read(row: Row, asked: str | None = None) -> Parsed:
    """A row of columns. `asked` is the question where another column than its own has it.

    Raises:
        RowError: no question, values of the wrong type, or keys of which several may be meant.
    """
    text, options_in_question = (asked, None) if asked is not None else question_text(row)
    if options_in_question is not None:
        row = _with_choices(row, options_in_question)
    gold_key, answer_key = _golds(row)
    found = _samples(row, answer_key)
    question = golds.make_question(row, text, gold_key=gold_key)
    kind = "sampled"
    if found is None:
        question, found = _worked(row, question)
        kind = "sampled" if found or any(part.endswith(_CONTRARY) for part in row.parts) else "question"
    return Parsed(question, found, kind, row.unread())


def question_text(row: Row) -> tuple[str, Any]:
    """Return the question's text and the choices inside its object, or None."""
    key = row.key("question") or row.key("messages")
    if key is None:
        raise RowError("missing key 'question'")
    value, choices = row.take(key), None
    if isinstance(value, dict) and "stem" in value:
        value, choices = value["stem"], value.get("choices")
    if is_turns(value):
        said, reply, system = exchange(value, key)
        if said is None or reply is not None:
            raise RowError(f"{key} expects one question of the user")
        if system:
            row.parts.add(f"{key}[system]")
        return said, choices
    text, system = unwrap_template(check_text(value, key), key)
    if system:
        row.parts.add(f"{key}[system]")
    other = row.values.get("input", row.values.get("Input"))
    if plain(key) == "instruction" and "question" not in row.mapping and isinstance(other, str):
        row.read |= {"input", "Input"} & row.values.keys()
        text = f"{text.strip()}\n{other.strip()}" if other.strip() else text
    return text, choices


def _with_choices(row: Row, choices: Any) -> Row:
    inner = Row(row.values | {"choices": choices}, row.mapping)
    inner.read, inner.parts = row.read, row.parts
    return inner


def _golds(row: Row) -> tuple[str | None, str | None]:
    """(key of the gold, key of the sample's own answer or None) where both may be called an answer."""
    keys = golds.gold_keys(row)
    if not keys or "gold" in row.mapping or "prediction" in row.mapping:
        return next(iter(keys), None), None
    own = {plain(key): key for key in keys}
    explicit = next((key for key in keys if plain(key) in _EXPLICIT), None)
    sampled = any(row.has(role) for role in (*_TEXTS, "samples"))
    if sampled and explicit and "answer" in own and not row.has("prediction"):
        return explicit, own["answer"]
    if not any(row.has(role) for role in ("samples", "completion", "prediction")) and any(
        map(is_reasoning, row.keys("rationale"))
    ):
        reply = next((own[name] for name in ("answer", "finalanswer") if name in own), None)
        if reply is not None:  # beside reasoning alone, the answer is what was replied
            return next((key for key in keys if key != reply), None), reply
    if (
        not explicit
        and {"answer", "finalanswer"} <= own.keys()
        and row.values[own["answer"]] != row.values[own["finalanswer"]]
    ):
        raise row.refuse("the gold answer", (own["answer"], own["finalanswer"]), "gold")
    return keys[0], None


def _samples(row: Row, answer_key: str | None) -> tuple[Rationale, ...] | None:
    """The samples of a row; None where it has none."""
    by_role = {role: row.keys(role) for role in ("samples", *_TEXTS)}
    lists = [
        key
        for keys in by_role.values()
        for key in keys
        if not isinstance(row.values[key], str) and not is_message(row, key)
    ]
    lists += [key for key in by_role["samples"] if _is_json(row.values[key])]
    choices = row.key("choices")
    if choices and golds.is_api_choices(row.values[choices]):
        lists.append(choices)
    if "samples" in row.mapping:
        lists = [key for key in lists if key == row.mapping["samples"]]
    if len(lists) > 1:
        raise row.refuse("the samples", lists, "samples")
    if lists:
        return _listed(row, lists[0])
    texts = {role: row.keys(role) for role in _TEXTS}
    texts["completion"] += by_role["samples"]  # one sample under a name of many
    # a rationale or explanation beside a reply is the gold's
    if texts["completion"] and "rationale" not in row.mapping:
        texts["rationale"] = [key for key in texts["rationale"] if is_reasoning(key)]
    texts["completion"] = _without_template(row, texts["completion"])
    for role, keys in texts.items():
        if len({str(row.values[key]) for key in keys}) > 1:
            raise row.refuse("the sample", keys, role)
    completion, rationale = (next(iter(texts[role]), None) for role in ("completion", "rationale"))
    row.read |= {key for keys in texts.values() for key in keys}
    answer = answer_key or row.key("prediction")
    if completion is None and rationale is None and answer is None:
        return _numbered(row)
    if answer and isinstance(row.values[answer], list | dict):
        raise RowError(
            f"{answer} is a list, but there are no samples; if these are the choices: --map choices={answer}"
        )
    reply = _reply(row, completion) if completion else None
    thinking = check_text(row.take(rationale), rationale) if rationale else ""
    whole = row.values[completion] if completion else None
    who, cut = golds.source(row), row_is_cut(row) or (isinstance(whole, dict) and is_cut(whole))
    row.read |= {answer} if answer else set()
    if rationale and is_reasoning(rationale) and "rationale" not in row.mapping:
        return (dataclasses.replace(with_reasoning(thinking, reply, row.values, answer, who), truncated=cut),)
    if answer is None:
        text = with_thinking(thinking, reply or "") if completion else thinking
        return (Rationale(text, None, who, reply=True, truncated=cut),)
    return (Rationale(thinking or reply or "", get_answer(row.values, answer), who, truncated=cut),)


def _without_template(row: Row, keys: list[str]) -> list[str]:
    """Without `text` where it is the whole prompt with another column's reply in it, as in Alpaca."""
    whole = next((key for key in keys if plain(key) == "text"), None)
    others = [key for key in keys if key != whole and isinstance(row.values[key], str)]
    if whole is None or not isinstance(row.values[whole], str) or not others:
        return keys
    if not all(row.values[key].strip() in row.values[whole] for key in others):
        return keys
    row.read.add(whole)
    return [key for key in keys if key != whole]


def _is_json(value: Any) -> bool:
    """Whether a cell of CSV holds a list or an object."""
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def is_message(row: Row, key: str) -> bool:
    """Whether a value is one reply as a message, rather than a list of samples."""
    value = row.values[key]
    if is_turns(value):
        return len(value) == 1 or has_question(value)
    return isinstance(value, dict) and ("content" in value or "message" in value)


def _reply(row: Row, key: str) -> str:
    value = row.take(key)
    if isinstance(value, dict):
        return reply_text(value.get("message", value))
    if is_turns(value):
        reply = exchange(value, key)[1]
        if reply is None:
            raise RowError(f"{key} has no turn of the assistant")
        return reply
    return check_text(value, key)


def _listed(row: Row, key: str) -> tuple[Rationale, ...]:
    items = []
    for item in sample_list(row.take(key), key):
        items += item if isinstance(item, list) and not is_turns(item) else [item]
    found = [
        _cut_by_column(read_sample(item, f"{key}[{index}]", row.parts), row, index)
        for index, item in enumerate(items)
        if item is not None
    ]
    answers = row.key("prediction")
    if answers and isinstance(row.values[answers], list) and len(found) == len(items):
        if len(row.values[answers]) != len(items):
            raise RowError(f"{key} has {len(items)} samples, but {answers} {len(row.values[answers])}")
        said = [get_answer({answers: answer}, answers) for answer in row.take(answers)]
        found = [dataclasses.replace(r, answer=answer, reply=False) for r, answer in zip(found, said, strict=True)]
    return tuple(found)


def _cut_by_column(sample: Rationale, row: Row, index: int) -> Rationale:
    return dataclasses.replace(sample, truncated=sample.truncated or row_is_cut(row, index))


def _numbered(row: Row) -> tuple[Rationale, ...] | None:
    """Samples in columns of their own, such as response_1, response_2; None where there are none."""
    found = row.numbered()
    if len(found) > 1:
        raise row.refuse("the samples", [keys[0] for keys in found.values()], "samples")
    for name, keys in found.items():
        answers = row.numbered_answers(name)
        row.read |= set(answers.values())
        samples = [read_sample(row.take(key), key, row.parts) for key in keys]
        if not answers:
            return tuple(samples)
        return tuple(
            dataclasses.replace(s, answer=get_answer(row.values, answers[key]) if key in answers else None, reply=False)
            for key, s in zip(keys, samples, strict=True)
        )
    return None


def _worked(row: Row, question: Question) -> tuple[Question, tuple[Rationale, ...]]:
    """Return the question and its worked solution: a rationale, or with an answer mark the gold."""
    key = row.key("solution")
    if key is None:
        return question, ()
    solution = check_text(row.take(key), key).strip()
    if question.gold is None:
        if len(solution.split()) < 4 or "####" in solution or "\\boxed{" in solution:
            return dataclasses.replace(question, gold=solution), ()
        return question, (Rationale(solution, None, golds.GOLD, reply=True),)
    if solution.strip("$") in (question.gold, f"\\boxed{{{question.gold}}}"):
        return question, ()  # an answer alone
    if canonical(question.gold, "number") is not None and not parse_choices(question.question):
        said = DEFAULT.read(_CALCULATOR.sub("", solution), "number").answer
        if said is not None and not DEFAULT.same(said, canonical(question.gold, "number") or "", "number"):
            row.parts.add(key + _CONTRARY)
            return question, ()
    text = _CALCULATOR.sub("", solution).partition("####")[0].strip()
    return question, (Rationale(text, question.gold, golds.GOLD),) if text else ()
