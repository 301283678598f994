"""The rows of other tools: recognised by their keys, read to the same questions, or refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from qcrd_fast.data.formats.fields import ROLES
from qcrd_fast.data.formats.registry import FORMATS
from qcrd_fast.data.load import load_questions, prepare, validate_file
from qcrd_fast.data.replies import Reader
from qcrd_fast.errors import InputError

TALK = {  # question: (gold, its samples)
    "A crate holds 6 jars. How many jars are in 3 crates?": ("18", ("3 * 6 = 18.", "6 + 6 + 6 is 18.", "3 + 6 = 9.")),
    "Ida had 9 nuts and ate 2. How many are left?": ("7", ("9 - 2 = 7.", "Nine less two: 7.", "9 + 2 = 11.")),
}


def said(text: str) -> str:
    """A whole reply, which ends in the answer."""
    return f"{text}\n#### {text.rstrip('.').split()[-1]}"


def answer_of(text: str) -> str:
    return text.rstrip(".").split()[-1]


def a_row_each(make: Any) -> list[dict[str, Any]]:
    return [make(q, gold, text) for q, (gold, texts) in TALK.items() for text in texts]


def a_list_each(make: Any) -> list[dict[str, Any]]:
    return [make(q, gold, list(texts)) for q, (gold, texts) in TALK.items()]


def chat(question: str, reply: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply, **more}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# format: rows, all of which are 2 questions, 4 positives, 2 negatives
SHAPES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "own": (
        "native",
        a_list_each(
            lambda q, g, t: {
                "question": q,
                "answer": g,
                "samples": [{"rationale": x, "answer": answer_of(x)} for x in t],
            }
        ),
    ),
    "own, replies": ("native", a_list_each(lambda q, g, t: {"question": q, "samples": list(map(said, t))})),
    "own, text key": (
        "native",
        a_list_each(lambda q, g, t: {"question": q, "samples": [{"text": said(x)} for x in t]}),
    ),
    "own, a row a sample, one id": (
        "native",
        [
            {"id": q[:9], "question": q, "samples": [{"rationale": x, "answer": answer_of(x)}]}
            for q, (_, t) in TALK.items()
            for x in t
        ],
    ),
    "own, samples as columns": (
        "native",
        a_list_each(lambda q, g, t: {"question": q, "samples": {"rationale": t, "answer": list(map(answer_of, t))}}),
    ),
    "flat": (
        "sample-rows",
        a_row_each(lambda q, g, x: {"question": q, "answer": g, "rationale": x, "prediction": answer_of(x)}),
    ),
    "flat, row ids": (
        "sample-rows",
        [{"id": i, **row} for i, row in enumerate(a_row_each(lambda q, g, x: {"question": q, "response": said(x)}))],
    ),
    "flat, other names": (
        "sample-rows",
        a_row_each(
            lambda q, g, x: {"Problem": q, "Ground Truth": g, "chain_of_thought": x, "predicted_answer": answer_of(x)}
        ),
    ),
    "flat, gold and answer": (
        "sample-rows",
        a_row_each(lambda q, g, x: {"question": q, "ground_truth": g, "reasoning": x, "answer": answer_of(x)}),
    ),
    "flat, thinking and reply": (
        "sample-rows",
        a_row_each(lambda q, g, x: {"question": q, "reasoning": x, "response": f"The answer is {answer_of(x)}."}),
    ),
    "OpenMathInstruct": (
        "sample-rows",
        a_row_each(
            lambda q, g, x: {
                "problem": q,
                "generated_solution": x,
                "expected_answer": g,
                "predicted_answer": answer_of(x),
                "dataset": "d",
            }
        ),
    ),
    "MetaMath": ("sample-rows", a_row_each(lambda q, g, x: {"query": q, "response": said(x), "type": "t"})),
    "messages": ("messages", a_row_each(lambda q, g, x: {"messages": chat(q, said(x))})),
    "messages, system": (
        "messages",
        a_row_each(
            lambda q, g, x: {
                "messages": [{"role": "system", "content": "Think."}, *chat(q, said(x))],
                "ground_truth": g,
            }
        ),
    ),
    "messages, parts": (
        "messages",
        a_row_each(
            lambda q, g, x: {
                "messages": [{"role": "user", "content": [{"type": "text", "text": q}]}, chat("", said(x))[1]]
            }
        ),
    ),
    "messages, reasoning apart": (
        "messages",
        a_row_each(lambda q, g, x: {"messages": chat(q, f"The answer is {answer_of(x)}.", reasoning_content=x)}),
    ),
    "sharegpt": (
        "sharegpt",
        a_row_each(
            lambda q, g, x: {
                "id": said(x),
                "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": said(x)}],
            }
        ),
    ),
    "conversation": ("sharegpt", a_row_each(lambda q, g, x: {"conversation": chat(q, said(x))})),
    "messages and choices": (
        "vllm",
        a_list_each(
            lambda q, g, t: {
                "messages": chat(q, "")[:1],
                "choices": [
                    {"index": i, "message": chat("", said(x))[1], "finish_reason": "stop"} for i, x in enumerate(t)
                ],
            }
        ),
    ),
    "alpaca": ("alpaca", a_row_each(lambda q, g, x: {"instruction": q, "input": "", "output": said(x)})),
    "alpaca, input": (
        "alpaca",
        a_row_each(lambda q, g, x: {"instruction": "Solve it.", "input": q, "output": said(x)}),
    ),
    "prompt, completion": ("prompt-completion", a_row_each(lambda q, g, x: {"prompt": q, "completion": said(x)})),
    "prompt, completion as messages": (
        "prompt-completion",
        a_row_each(lambda q, g, x: {"prompt": chat(q, "")[:1], "completion": chat("", said(x))[1:]}),
    ),
    "distilabel": (
        "distilabel",
        a_list_each(lambda q, g, t: {"instruction": q, "generations": list(map(said, t)), "model_name": "m"}),
    ),
    "distilabel, one": (
        "distilabel",
        a_row_each(lambda q, g, x: {"instruction": q, "generation": said(x), "model_name": "m"}),
    ),
    "open-r1": (
        "open-r1",
        a_list_each(
            lambda q, g, t: {
                "problem": q,
                "solution": f"It is \\boxed{{{g}}}.",
                "answer": g,
                "generations": [f"<think>\n{x}\n</think>\n\\boxed{{{answer_of(x)}}}" for x in t],
                "messages": chat(q, said(t[0])),
                "uuid": q[::-1],
            }
        ),
    ),
    "generations as objects": (
        "samples",
        a_list_each(
            lambda q, g, t: {
                "question": q,
                "gold": g,
                "generations": [{"text": said(x), "finish_reason": "stop"} for x in t],
            }
        ),
    ),
    "responses as messages": (
        "samples",
        a_list_each(
            lambda q, g, t: {"question": q, "responses": [{"role": "assistant", "content": said(x)} for x in t]}
        ),
    ),
    "conversations in a list": (
        "samples",
        a_list_each(lambda q, g, t: {"prompt": q, "completions": [chat(q, said(x)) for x in t]}),
    ),
    "texts and their answers": (
        "samples",
        a_list_each(lambda q, g, t: {"question": q, "answer": g, "rationales": t, "answers": list(map(answer_of, t))}),
    ),
    "numbered columns": (
        "sample-rows",
        a_list_each(
            lambda q, g, t: {"question": q, "answer": g, **{f"Response_{i}": said(x) for i, x in enumerate(t, 1)}}
        ),
    ),
    "messages and columns": (
        "samples",
        a_list_each(
            lambda q, g, t: {"messages": chat(q, "")[:1], "completions": list(map(said, t)), "ground_truth": g}
        ),
    ),
    "messages and a reply": (
        "messages",
        a_row_each(lambda q, g, x: {"messages": chat(q, "")[:1], "response": said(x), "ground_truth": g}),
    ),
    "messages in columns": (
        "messages",
        a_row_each(lambda q, g, x: {"messages": {"role": ["user", "assistant"], "content": [q, said(x)]}}),
    ),
    "messages as JSON text": ("messages", a_row_each(lambda q, g, x: {"messages": json.dumps(chat(q, said(x)))})),
    "vllm": (
        "vllm",
        a_list_each(lambda q, g, t: {"prompt": q, "outputs": [{"index": i, "text": said(x)} for i, x in enumerate(t)]}),
    ),
    "a response with choices": (
        "samples",
        a_list_each(
            lambda q, g, t: {"question": q, "response": {"choices": [{"message": chat("", said(x))[1]} for x in t]}}
        ),
    ),
    "mentor-kd": (
        "mentor-kd",
        a_row_each(
            lambda q, g, x: {"input": q, "chain": x, "completion": answer_of(x), "answer": g, "initial_correct": False}
        ),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_questions_in_every_shape(shape: str, tmp_path: Path) -> None:
    name, rows = SHAPES[shape]
    path = write(tmp_path / "rows.jsonl", rows)
    summary, _ = prepare(path, tmp_path / "out.jsonl")
    assert summary.format == name
    assert (summary.questions, summary.positives, summary.negatives) == (2, 4, 2), summary
    assert not list(validate_file(path)) and summary.answers_dropped == 0
    questions = load_questions(tmp_path / "out.jsonl").questions
    assert [q.majority for q in questions] == ["18", "7"] and all(next(iter(TALK)) in q.question for q in questions[:1])
    assert all(q.gold in (None, q.majority) for q in questions)


def test_every_format_of_the_table_has_a_name_of_its_own() -> None:
    names = [format.name for format in FORMATS]
    assert len(set(names)) == len(names) and {name for name, _ in SHAPES.values()} < set(names)


# Golds and choices

TRAIN = {"text": ["oven", "train", "pillow"], "label": ["A", "B", "C"]}
CHOICES: dict[str, dict[str, Any]] = {
    "CommonsenseQA": {"id": "x", "question": "Which one goes to work?", "choices": TRAIN, "answerKey": "B"},
    "ARC, numbers as labels": {"question": "Which?", "choices": {**TRAIN, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "labels in another order": {
        "question": "Which?",
        "choices": {"text": ["pillow", "oven", "train"], "label": ["C", "A", "B"]},
        "answerKey": "B",
    },
    "OpenBookQA": {"question_stem": "Which one goes to work?", "choices": TRAIN, "answerKey": "B"},
    "ARC's own": {
        "question": {
            "stem": "Which?",
            "choices": [{"label": label, "text": text} for label, text in zip("ABC", TRAIN["text"], strict=True)],
        },
        "answerKey": "B",
    },
    "MMLU": {"question": "Which?", "subject": "travel", "choices": TRAIN["text"], "answer": 1},
    "MMLU-Pro": {"question": "Which?", "options": TRAIN["text"], "answer": "B", "answer_index": 1},
    "MedQA": {
        "question": "Which?",
        "options": dict(zip("ABC", TRAIN["text"], strict=True)),
        "answer": "train",
        "answer_idx": "B",
    },
    "AQuA": {"question": "Which?", "options": ["A)oven", "B)train", "C)pillow"], "correct": "B"},
    "columns": {"Question": "Which?", "A": "oven", "B": "train", "C": "pillow", "Answer": "B"},
    "a label as index": {"question": "Which?", "choices": TRAIN["text"], "label": 1},
}


@pytest.mark.parametrize("shape", CHOICES)
@pytest.mark.parametrize(
    "samples",
    [None, ["It carries. The answer is (B).", "One boards it. The answer is train.", "It is hot. The answer is A."]],
)
def test_choices_and_their_golds(shape: str, samples: Any, tmp_path: Path) -> None:
    row = CHOICES[shape] | ({"samples": samples} if samples else {})
    (question,) = load_questions(write(tmp_path / "rows.jsonl", [row])).questions
    labels = "123" if "numbers" in shape else "abc"
    lines = [f"({label}) {text}" for label, text in zip(labels, TRAIN["text"], strict=True)]
    assert question.question.endswith("\n".join(["Answer Choices:", *lines])) and question.task == "choice"
    assert question.gold in ("train", "B")
    if samples:
        assert question.majority == "train" and len(question.positives) == 2 and len(question.negatives) == 1


def test_an_index_beside_numbers_is_an_index(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    assert load_questions(write(tmp_path / "rows.jsonl", [row])).questions[0].gold == "2"


@pytest.mark.parametrize(
    ("gold", "reason"), [(3, "answer is choice 3, counted from 0; there are 3"), ("7", "none of the choices")]
)
def test_a_gold_that_is_no_choice_is_refused(gold: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "Which?", "choices": TRAIN["text"], "answer": gold}])
    with pytest.raises(InputError, match=reason):
        load_questions(path)


def test_booleans_are_yes_and_no(tmp_path: Path) -> None:
    rows = [
        {
            "question": "Can a cat swim?",
            "answer": True,
            "samples": [{"rationale": r, "answer": a} for r, a in (("x", True), ("y", False))],
        },
        {"question": "Can a stone?", "answer": False, "samples": [{"rationale": "no", "answer": "no"}]},
    ]
    first, second = load_questions(write(tmp_path / "rows.jsonl", rows)).questions
    assert (first.gold, first.task, second.gold) == ("yes", "yes-no", "no") and set(first.votes) == {"yes", "no"}


WORKED = {
    "gsm8k": [{"question": q, "answer": f"{t[0]} <<1+1=2>>\n#### {g}"} for q, (g, t) in TALK.items()],
    "worked": [{"problem": q, "solution": f"{t[0]} So \\boxed{{{g}}}.", "level": "1"} for q, (g, t) in TALK.items()],
}


@pytest.mark.parametrize("shape", WORKED)
def test_a_worked_solution_is_a_positive(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write(tmp_path / "rows.jsonl", WORKED[shape]), tmp_path / "out.jsonl"
    assert entry(["prepare", str(path), "-o", str(output)]) == 0
    assert "own solutions" in capsys.readouterr().err
    for question in load_questions(output).questions:
        (positive,) = question.positives
        gold, texts = TALK[question.question]
        assert (question.gold, question.majority, positive.source, positive.answer) == (gold, gold, "gold", gold)
        assert positive.text.startswith(texts[0]) and "####" not in positive.text and not question.negatives


def test_a_worked_gold_beside_samples_is_the_gold_alone(tmp_path: Path) -> None:
    rows = a_list_each(lambda q, g, t: {"question": q, "answer": f"Well.\n#### {g}", "samples": list(map(said, t))})
    for question in load_questions(write(tmp_path / "rows.jsonl", rows)).questions:
        assert question.gold == question.majority and len(question.positives) == 2


# Preference pairs

PAIRS = {
    "texts": [{"prompt": q, "chosen": said(t[0]), "rejected": said(t[2])} for q, (_, t) in TALK.items()],
    "conversations": [{"chosen": chat(q, said(t[0])), "rejected": chat(q, said(t[2]))} for q, (_, t) in TALK.items()],
    "messages": [
        {
            "prompt": chat(q, "")[:1],
            "chosen": chat("", said(t[0]))[1:],
            "rejected": chat("", said(t[2]))[1:],
            "score_chosen": 1.0,
        }
        for q, (_, t) in TALK.items()
    ],
    "rejected ones agree": [
        {"prompt": q, "chosen": said(t[0]), "rejected": said(f"{way} {t[2]}")}
        for q, (_, t) in TALK.items()
        for way in "abc"
    ],
}


@pytest.mark.parametrize("shape", PAIRS)
def test_the_chosen_one_is_the_majority(shape: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PAIRS[shape])
    summary, _ = prepare(path, tmp_path / "out.jsonl")
    assert (summary.format, summary.questions, summary.positives) == ("preference", 2, 2)
    assert summary.negatives == len(PAIRS[shape]) and summary.ties == 0
    assert [q.majority for q in load_questions(path).questions] == ["18", "7"]


# OpenAI batches


def batch(tmp_path: Path, bodies: list[dict[str, Any]], asked: list[dict[str, Any]] | None = None) -> tuple[Path, Path]:
    asked = asked or [{"messages": chat(q, "")[:1]} for q in TALK]
    requests = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1", "body": body} for i, body in enumerate(asked)]
    replies = [
        {"id": f"b{i}", "custom_id": f"r{i}", "response": {"status_code": 200, "body": body}, "error": None}
        for i, body in enumerate(bodies)
    ]
    return write(tmp_path / "out.jsonl", replies[::-1]), write(tmp_path / "in.jsonl", requests)


BODIES = [
    {"model": "m", "choices": [{"index": 0, "message": chat("", said(x))[1]} for x in t]} for _, t in TALK.values()
]


def test_a_batch_is_joined_to_its_input(tmp_path: Path) -> None:
    replies, requests = batch(tmp_path, BODIES)
    result = load_questions(replies, batch_input=requests)
    assert result.summary.format == "openai-batch" and {q.question for q in result.questions} == TALK.keys()
    assert (result.summary.positives, result.summary.negatives) == (4, 2) and result.questions[0].positives[
        0
    ].source == "m"
    assert {q.question for q in load_questions(requests).questions} == TALK.keys()  # for collect
    with pytest.raises(InputError, match="is for the output of a batch"):
        load_questions(requests, batch_input=requests)


def test_a_batch_of_the_other_endpoints(tmp_path: Path) -> None:
    texts = [t[0] for _, t in TALK.values()]
    bodies: list[dict[str, Any]] = [
        {"choices": [{"text": said(texts[0]), "index": 0}]},
        {
            "output": [
                {"type": "reasoning", "summary": []},
                {"type": "message", "content": [{"type": "output_text", "text": said(texts[1])}]},
            ]
        },
    ]
    asked = [{"prompt": q} if i == 0 else {"input": q} for i, q in enumerate(TALK)]
    replies, requests = batch(tmp_path, bodies, asked)
    assert {q.majority for q in load_questions(replies, batch_input=requests).questions} == {"18", "7"}


def test_a_batch_without_its_input_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies, _ = batch(tmp_path, BODIES)
    assert entry(["prepare", str(replies), "-o", str(tmp_path / "o")]) == 2
    assert "--batch-input FILE" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_what_failed_in_a_batch_is_named_and_set_aside(tmp_path: Path) -> None:
    replies, requests = batch(tmp_path, BODIES)
    failed = [
        {
            "custom_id": "r0",
            "response": {"status_code": 429, "body": {"error": {"message": "too many"}}},
            "error": None,
        },
        {"custom_id": "r1", "response": None, "error": {"code": "batch_expired", "message": "This request expired."}},
        {"custom_id": "r7", "response": {"status_code": 200, "body": BODIES[0]}, "error": None},
    ]
    replies.write_text(replies.read_text() + "".join(json.dumps(row) + "\n" for row in failed))
    with pytest.raises(InputError, match=r"out\.jsonl:3: request 'r0' failed: too many \(status 429\)"):
        load_questions(replies, batch_input=requests)
    result = load_questions(replies, batch_input=requests, on_bad_row="skip")
    assert [bad.reason for bad in result.skipped] == [
        "request 'r0' failed: too many (status 429)",
        "request 'r1' failed: This request expired.",
        "custom_id 'r7' is not in --batch-input",
    ]
    assert result.summary.positives == 4
    requests.write_text('{"custom_id": "r0"}\n')
    with pytest.raises(InputError, match=r"in\.jsonl:1: --batch-input expects requests"):
        load_questions(replies, batch_input=requests)


# What is refused, and nothing silent

Q = "2 + 2?"
REFUSED = {
    "several turns": ({"messages": [*chat(Q, "4"), *chat("And 3 + 3?", "6")]}, "messages has 2 questions"),
    "two replies": ({"messages": [*chat(Q, "4"), chat("", "5")[1]]}, "2 turns of the assistant in a row"),
    "a tool": ({"messages": [*chat(Q, "4"), {"role": "tool", "content": "4"}]}, "messages[2] is of 'tool'"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0]: content has parts that are not text",
    ),
    "no user": ({"messages": chat(Q, "4")[1:]}, "messages has no turn of the user"),
    "messages as text": ({"messages": "user: 2 + 2?"}, "messages expects a list of messages"),
    "two replies to choose from": (
        {"question": Q, "response": "4", "output": "5"},
        "'response' and 'output' may each be the sample",
    ),
    "two lists": (
        {"question": Q, "generations": ["4"], "responses": ["5"]},
        "'generations' and 'responses' may each be the samples",
    ),
    "two answers": (
        {"question": Q, "rationale": "r", "answer": "4", "final_answer": "5"},
        "'answer' and 'final_answer' may each be",
    ),
    "several golds": ({"query": Q, "answer": ["4", "5"], "samples": ["4"]}, "answer has 2 answers; one is expected"),
    "answers that are not as many": (
        {"question": Q, "rationales": ["a", "b"], "answers": ["4"]},
        "rationales has 2 samples, but answers 1",
    ),
    "a pair without a prompt": ({"chosen": "4", "rejected": "5"}, "no question: chosen and rejected are texts"),
    "a pair of two questions": ({"chosen": chat("1?", "4"), "rejected": chat("2?", "5")}, "answer different questions"),
    "a sample that is a number": ({"problem": Q, "generations": [4]}, "generations[0] expects a string or an object"),
    "a sample without text": (
        {"problem": Q, "generations": [{"tokens": 4}]},
        "generations[0]: missing key 'rationale' (there: 'tokens')",
    ),
    "an empty question": ({"problem": " ", "response": "4"}, "the question is empty"),
    "labels that do not fit": (
        {"question": Q, "choices": {"text": ["a", "b"], "label": ["A"]}},
        "choices: 2 texts, but 1 labels",
    ),
    "a label of a reply": (
        {"prompt": Q, "completion": "4", "label": True},
        "label may be of the reply or a gold answer",
    ),
    "answers without samples": (
        {"question": Q, "answers": ["4", "5"], "label": 0},
        "if these are the choices: --map choices=answers",
    ),
    "no question": (
        {"qestion": Q, "response": "4"},
        "missing key 'question'; keys not read: 'qestion' (nearest that is read: 'question')",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_ambiguous_or_broken_is_refused(kind: str, tmp_path: Path) -> None:
    row, reason = REFUSED[kind]
    path = write(tmp_path / "rows.jsonl", [row])
    (bad,) = validate_file(path)
    assert bad.line == 1 and reason in bad.reason
    with pytest.raises(InputError, match=r"rows\.jsonl:1: "):
        prepare(path, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("row", "key", "near"),
    [
        ({"question": Q, "answer": "4", "sampels": [{"rationale": "r", "answer": "4"}]}, "sampels", "samples"),
        ({"question": Q, "answer": "4", "Rational": "It is 4."}, "Rational", "rationale"),
        ({"problem": Q, "answer": "4", "generation_s_": None, "generatons": ["It is 4."]}, "generatons", "generations"),
    ],
)
def test_a_misspelt_key_gives_no_empty_result(
    row: dict[str, Any], key: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write(tmp_path / "rows.jsonl", [row]), tmp_path / "out.jsonl"
    assert entry(["prepare", str(path), "-o", str(output)]) == 2
    out, err = capsys.readouterr()
    assert f"{key!r} (nearest that is read: {near!r})" in err and out == "" and not output.exists()
    assert entry(["validate", str(path)]) == 0
    assert f"{key!r} (nearest that is read: {near!r})" in capsys.readouterr().err


def test_what_was_read_and_what_was_not_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = a_list_each(
        lambda q, g, t: {
            "question": q,
            "samples": [{"rationale": x, "anwser": 1, "answer": "1"} for x in t],
            "mood": "x",
        }
    )
    path, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    assert entry(["prepare", str(path), "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert (
        out.splitlines()[0]
        == f"took {path} for JSONL, native: rows of this project; 2 rows; task number (a guess; --task says otherwise)"
    )
    assert "keys not read: 'mood', 'samples[].anwser' (nearest that is read: 'answer')" in err
    assert entry(["prepare", str(path), "-o", str(output), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"took {path} for JSONL")
    told = json.loads(out)
    assert told["format"] == "native" and told["keys_not_read"] == {"samples[].anwser": "answer", "mood": None}


def test_single_samples_and_no_samples_are_warned_of(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"question": Q, "response": "Two and two. The answer is 4."}])
    assert "nothing to vote on" in prepare(one, tmp_path / "out.jsonl")[0].warnings[0]
    none = write(tmp_path / "none.jsonl", [{"question": Q, "answer": "4"}])
    assert "no question has a sample" in prepare(none, tmp_path / "out.jsonl")[0].warnings[0]
    for rows in ([{"question": Q}], [{"question": Q, "answer": "4", "samples": [{"rationale": "r", "answer": None}]}]):
        with pytest.raises(InputError, match="nothing to train on"):
            prepare(write(tmp_path / "bad.jsonl", rows), tmp_path / "bad.out")
        assert not (tmp_path / "bad.out").exists()


# --map and --format


def test_map_names_the_keys(tmp_path: Path) -> None:
    rows = a_list_each(
        lambda q, g, t: {"Frage": q, "meta": {"truth": g}, "Texte": list(map(said, t)), "response": "no"}
    )
    path = write(tmp_path / "rows.jsonl", rows)
    result = load_questions(path, mapping="question=Frage,samples=Texte,gold=meta.truth")
    assert (result.summary.positives, result.summary.negatives) == (4, 2) and result.questions[0].gold == "18"
    rows = a_row_each(lambda q, g, x: {"question": q, "rationale": x, "answer": answer_of(x)})
    path = write(tmp_path / "flat.jsonl", rows)
    with pytest.raises(InputError, match=r"gold is '18', but '9' at .*:3.*--map prediction=answer"):
        load_questions(path)
    assert load_questions(path, mapping={"prediction": "answer"}).summary.negatives == 2
    told = a_row_each(lambda q, g, x: {"talk": chat(q, said(x))})
    assert load_questions(write(tmp_path / "t.jsonl", told), mapping="messages=talk").summary.negatives == 2


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ("qestion=a", "'qestion' is none of id, question, .*did you mean 'question'"),
        ("question", "expects NAME=KEY"),
        ("question=problem,problem=question", "question is given twice"),
        ("question=question,gold=nowhere", "no row has a key 'nowhere'"),
        ("question=nowhere", "missing key 'question'"),
    ],
)
def test_a_mapping_is_checked(mapping: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", SHAPES["own"][1])
    with pytest.raises(InputError, match=reason):
        load_questions(path, mapping=mapping)


def test_a_format_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", SHAPES["messages"][1])
    assert load_questions(path, format="messages").summary.negatives == 2
    with pytest.raises(InputError, match=r":1: missing key 'question'"):
        load_questions(path, format="native")
    with pytest.raises(InputError, match="--format is one of auto, alpaca"):
        load_questions(path, format="xml")


def test_rows_of_several_files_are_pooled_by_text(tmp_path: Path) -> None:
    flat = a_row_each(lambda q, g, x: {"question": q, "response": said(x)})
    files = [
        write(tmp_path / f"{i}.jsonl", [{"id": f"{i}-{n}", **row} for n, row in enumerate(flat[i::2])])
        for i in range(2)
    ]
    result = load_questions(files)
    assert (
        result.summary.questions == 2
        and result.summary.positives == 4
        and [q.id for q in result.questions] == ["0-0", "0-2"]
    )


# The documentation


def documented() -> list[tuple[str, str]]:
    """(format, example row) of the table in docs/formats.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([\w-]+)` \|.*\| `(\{.*\})` \|$", text, re.MULTILINE)


def test_every_format_and_role_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert {name for name, _ in documented()} == {format.name for format in FORMATS}
    assert all(f"`{role}`" in text for role in ROLES)


@pytest.mark.parametrize(("name", "example"), documented())
def test_the_documented_example_is_read_as_it_says(name: str, example: str, tmp_path: Path) -> None:
    path, requests = tmp_path / "rows.jsonl", tmp_path / "in.jsonl"
    path.write_text(example + "\n", encoding="utf-8")
    write(requests, [{"custom_id": "a", "body": {"messages": chat("2 + 2?", "")[:1]}}])
    result = load_questions(path, batch_input=requests if name == "openai-batch" else None)
    assert result.summary.format == name and result.summary.questions == 1
    assert set(result.summary.keys_not_read) <= {"model_name"}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_row_without_a_sample_is_a_question_wherever_it_stands(place: int, tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "answer": "2", "response": f"So. Answer: {x}"} for x in (2, 3)]
    rows.insert(place, {"question": "2 + 2?", "answer": "4", "response": None})  # type: ignore[dict-item]
    result = load_questions(write(tmp_path / "rows.jsonl", rows))
    assert {q.question: len(q.votes) for q in result.questions} == {"1 + 1?": 2, "2 + 2?": 0}
    assert "1 of 3 rows have no sample" in result.summary.warnings[0]


def test_a_misspelt_key_among_samples_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "response": "It is 2."}, {"question": "1 + 1?", "respones": "It is 3."}]
    with pytest.raises(InputError, match=":2: no sample, which the rows above have"):
        load_questions(write(tmp_path / "rows.jsonl", rows))


def test_a_completion_without_a_chain_is_a_sample(tmp_path: Path) -> None:
    rows = [{"input": "1 + 1?", "completion": f"So it is {x}.", "answer": "2"} for x in (2, 3)]
    result = load_questions(write(tmp_path / "rows.jsonl", rows))
    assert (result.summary.format, result.questions[0].votes) == ("sample-rows", {"2": 1, "3": 1})


def test_samples_that_only_vote_are_samples(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "gold": "2", "prediction": x} for x in ("2", "3", "2")]
    warnings = load_questions(write(tmp_path / "rows.jsonl", rows)).summary.warnings
    assert not any("no question has a sample" in warning for warning in warnings)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("other", ["gold", "sample", "native"])
def test_rows_with_an_id_and_rows_of_another_tool_are_pooled_by_text(other: str, swapped: bool, tmp_path: Path) -> None:
    own = {"id": "q1", "question": "1 + 1?", "samples": ["So. Answer: 2", "Or so. Answer: 2"]}
    rows = {
        "gold": {"problem_id": "p-7", "problem": "1 + 1?", "final_answer": "2", "solution": ""},
        "sample": {"id": "zz", "instruction": "1  + 1?", "output": "So. Answer: 3"},
        "native": {"question": "1 + 1?", "answer": "2"},
    }
    paths = [write(tmp_path / "a.jsonl", [own]), write(tmp_path / "b.jsonl", [rows[other]])]
    (question,) = load_questions(paths[::-1] if swapped else paths).questions
    assert question.id == "q1" and question.votes == ({"2": 2, "3": 1} if other == "sample" else {"2": 2})
    assert question.gold == (None if other == "sample" else "2")


def test_different_ids_of_our_rows_stay_apart(tmp_path: Path) -> None:
    rows = [{"id": id, "question": "1 + 1?", "samples": ["So. Answer: 2"]} for id in ("a", "b")]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [q.id for q in load_questions(path).questions] == ["a", "b"]
    other = write(tmp_path / "other.jsonl", [{"instruction": "1 + 1?", "output": "So. Answer: 3"}])
    with pytest.raises(InputError, match=r"other\.jsonl:1: this question has the ids 'a' and 'b'"):
        load_questions([path, other])


def test_ids_that_number_the_samples_are_no_ids_of_questions(tmp_path: Path) -> None:
    rows = [{"id": n, "question": q, "response": f"So. Answer: {n}"} for q in ("1 + 1?", "2 + 2?") for n in range(2)]
    path = write(tmp_path / "rows.jsonl", rows)
    result = load_questions(path)
    assert [(q.question, dict(q.votes)) for q in result.questions] == [
        (q, {"0": 1, "1": 1}) for q in ("1 + 1?", "2 + 2?")
    ]
    assert (
        len({q.id for q in result.questions}) == 2
        and "2 rows have the id of another question" in result.summary.warnings[0]
    )
    again = write(tmp_path / "again.jsonl", [{"id": "0", "question": "3 + 3?", "response": "So. Answer: 6"}])
    assert len({q.id for q in load_questions([path, again]).questions}) == 3
    ours = write(tmp_path / "ours.jsonl", [{"id": "0", "question": "9 + 9?", "samples": ["So. Answer: 18"]}])
    result = load_questions([path, ours])
    assert len({q.id for q in result.questions}) == 3 and result.questions[-1].id == "0"
    assert "1 questions have the id of another question in another file" in " ".join(result.summary.warnings)


@pytest.mark.parametrize(
    ("key", "values"), [("facts", ["Ida has 3.", "Bo has 5."]), ("input", ["3", "5"]), ("prompt_id_problem", None)]
)
def test_what_stands_beside_a_question_is_not_lost(key: str, values: list[str] | None, tmp_path: Path) -> None:
    if values is None:
        key, values = "problem", ["3 + 0?", "5 + 0?"]
    rows = [
        {"question": "How many?", key: value, "response": f"So. Answer: {n}"}
        for n, value in zip("35", values, strict=True)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    role = "question" if key == "problem" else "context"
    with pytest.raises(InputError, match=rf":2: the same question as at .*:1, but another '{key}'.*--map {role}={key}"):
        load_questions(path)
    assert len(load_questions(path, mapping=f"{role}={key}").questions) == 2
    assert len(load_questions(path, mapping="question=question").questions) == 1
    assert len(load_questions(write(tmp_path / "same.jsonl", [rows[0], {**rows[1], key: values[0]}])).questions) == 1


def test_a_list_of_contexts_is_one_context(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "context": ["Look.", text], "response": "So. Answer: 3"}
        for text in ("Ida: 3.", "Bo: 3.")
    ]
    questions = load_questions(write(tmp_path / "rows.jsonl", rows)).questions
    assert [q.context for q in questions] == ["Look.\nIda: 3.", "Look.\nBo: 3."]


def test_another_system_prompt_is_told(tmp_path: Path) -> None:
    def row(system: str, n: int) -> dict[str, Any]:
        turns = [("system", system), ("user", "How many?"), ("assistant", f"So. Answer: {n}")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    result = load_questions(write(tmp_path / "rows.jsonl", [row("Ida has 3.", 3), row("Bo has 5.", 5)]))
    assert "1 rows were pooled with a question under another system prompt" in " ".join(result.summary.warnings)
    result = load_questions(write(tmp_path / "rows.jsonl", [row("Think.", 3), row("Think.", 5)]))
    assert "system" not in " ".join(result.summary.warnings)


def test_a_decimal_comma_is_a_number(tmp_path: Path) -> None:
    comma = Reader.from_options(decimal="comma")
    rows = [{"question": "5 / 2?", "answer": "2,5", "samples": ["Also 2,5.", "Antwort: 2,50", "Antwort: 3"]}]
    (question,) = load_questions(write(tmp_path / "rows.jsonl", rows), reader=comma).questions
    assert question.task == "number" and sorted(question.votes.values()) == [1, 2]
    del rows[0]["answer"]
    (question,) = load_questions(write(tmp_path / "rows.jsonl", rows), reader=comma).questions
    assert question.task == "number" and sorted(question.votes.values()) == [1, 2]


def test_two_worked_solutions_of_a_question(tmp_path: Path) -> None:
    rows = [
        {"question": "3 * 6?", "answer": f"{text}\n#### {n}"}
        for text, n in (("3 * 6 = 18", 18), ("6 + 6 + 6 = 18", 18))
    ]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[0]])
    (question,) = load_questions(path).questions
    assert [p.text for p in question.positives] == ["3 * 6 = 18", "6 + 6 + 6 = 18"] and question.votes == {"18": 2}
    rows[1]["answer"] = "3 + 6 = 9\n#### 9"
    with pytest.raises(InputError, match="if these are samples: --map completion=KEY"):
        load_questions(write(tmp_path / "rows.jsonl", rows))
    assert load_questions(path, mapping="completion=answer").summary.negatives == 1


def test_requests_of_a_batch_without_output_are_told(tmp_path: Path) -> None:
    def asked(identity: str) -> dict[str, Any]:
        return {"custom_id": identity, "body": {"messages": [{"role": "user", "content": f"What is {identity}?"}]}}

    said = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "So. Answer: 3"}}]}
    output = write(tmp_path / "out.jsonl", [{"custom_id": "a", "response": {"status_code": 200, "body": said}}])
    requests = write(tmp_path / "in.jsonl", [asked("a"), asked("b"), asked("c")])
    summary = load_questions(output, batch_input=requests).summary
    assert summary.warnings[0] == "2 of 3 requests of --batch-input have no line of output: 'b', 'c'"


def test_a_forced_format_is_checked(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", a_row_each(lambda q, g, x: {"instruction": q, "input": "", "output": said(x)})
    )
    assert load_questions(path, format="sample-rows").summary.samples == 6
    for name in ("mentor-kd", "preference", "questions", "gsm8k"):
        with pytest.raises(
            InputError, match=f"--format {name} is for .* its rows have 'instruction', 'input', 'output'; .*'alpaca'"
        ):
            load_questions(path, format=name)


def test_messages_name_what_is_there(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "samples": ["So. Answer: 2"]}, {"Qestion": "1 + 1?", "Sampels": ["So. Answer: 3"]}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        InputError, match=r":2: missing key 'question'; .*'Sampels' \(nearest that is read: 'samples'\)"
    ):
        load_questions(path)
    with pytest.raises(InputError, match="--map question=nowhere, but there is no 'nowhere'"):
        load_questions(path, mapping="question=nowhere")
    requests = write(tmp_path / "in.jsonl", [{"custom_id": "a", "body": {"prompt": "1 + 1?"}}])
    with pytest.raises(InputError, match=r"which no input is: took .*rows\.jsonl for JSONL, native"):
        load_questions(write(tmp_path / "rows.jsonl", rows[:1]), batch_input=requests)


def _gold(tmp_path: Path, row: dict[str, Any], mapping: str | None = None) -> str | None:
    path = write(tmp_path / "rows.jsonl", [{"question": "Which?"} | row])
    return load_questions(path, mapping=mapping).questions[0].gold


@pytest.mark.parametrize(
    ("choices", "answer", "mapping", "gold"),
    [
        ([10, 20, 30], 20, None, "20"), ([10, 20, 30], 1, None, "20"), ([0, 1, 2], 2, None, "2"),
        ([0.5, 1.5], 1.5, None, "1.5"), ([10, 20.0], 20, None, "20.0"), ([1, 2, 3], "2", None, "2"),
        ([1, 2, 3], 2, "gold=answer", "3"), (["1", "2", "3"], 1, None, "2"), ([1, "two"], 1, None, "two"),
        ({"text": [3, 2, 1], "label": ["1", "2", "3"]}, 3, None, "(3) 1"), ([], 2, None, "2"),
    ],
)  # fmt: skip
def test_a_number_beside_choices_that_are_numbers(tmp_path, choices, answer, mapping, gold):
    assert _gold(tmp_path, {"choices": choices, "answer": answer}, mapping) == gold


@pytest.mark.parametrize(
    ("choices", "answer", "reason"),
    [
        (
            [1, 2, 3, 4],
            2,
            "answer is 2, which is the choice 2 or, counted from 0, the choice 3; write the choice as text",
        ),
        ([1, 2, 3, 4], 1.0, "answer is 1, which is the choice 1 or, counted from 0, the choice 2"),
        ([10, 20, 30], 5, "answer is choice 5, counted from 0; there are 3"),
    ],
)
def test_a_number_that_is_one_choice_and_counts_another_is_refused(tmp_path, choices, answer, reason):
    with pytest.raises(InputError, match=re.escape(f"rows.jsonl:1: {reason}")):
        _gold(tmp_path, {"choices": choices, "answer": answer})


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"gold": "5", "answer": 5.0}, "5"), ({"gold": "5", "answer": "2 + 3 = 5\n#### 5"}, "5"),
        ({"gold": "yes", "answer": True}, "yes"), ({"gold": "1/2", "answer": "\\frac{1}{2}"}, "1/2"),
        ({"gold": "B", "answer": "zoo", "choices": ["park", "zoo"]}, "B"), ({"gold": None, "answer": "7"}, "7"),
        ({"gold": "n/a", "answer": "7"}, "7"), ({"gold": "none", "answer": ""}, "none"),
    ],
)  # fmt: skip
def test_two_keys_of_one_gold(tmp_path, row, gold):
    assert _gold(tmp_path, row) == gold


@pytest.mark.parametrize("row", [{"gold": "5", "answer": "7"}, {"gold": "5", "answer": 7, "samples": ["It is 5."]}])
def test_two_golds_that_differ_are_refused(tmp_path, row):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: 'gold' and 'answer' may each be the gold answer; say which"):
        _gold(tmp_path, row)
    assert _gold(tmp_path, row, "gold=gold") == "5"


def test_golds_with_units_and_missing_ones_are_numbers(tmp_path: Path) -> None:
    rows = [
        {
            "question": "How far?",
            "answer": "12 km",
            "samples": ["Answer: 12 km", "Answer: 12 kilometers", "Answer: 12"],
        },
        {"question": "How heavy?", "answer": "10 kg", "samples": ["It is 5. Answer: 10 kg", "5 * 2. Answer: 10kg"]},
        {"question": "How long?", "answer": "n/a", "samples": ["3 + 4 = 7. Answer: 7 h"]},
    ]
    result = load_questions(write(tmp_path / "rows.jsonl", rows))
    assert [question.votes for question in result.questions] == [{"12": 3}, {"10": 2}, {"7": 1}]
    assert [question.gold for question in result.questions] == ["12 km", "10 kg", None]
    assert result.summary.inputs[0]["task"] == "number" and "; task number (a guess; " in result.summary.taken[0]
    stated = load_questions(write(tmp_path / "rows.jsonl", [row | {"task": "number"} for row in rows]))
    assert stated.summary.inputs[0]["task"] == "" and "guess" not in stated.summary.taken[0]


def test_options_lettered_in_cyrillic_are_voted_on(tmp_path: Path) -> None:
    said = ["2 + 2 = 4. Ответ: Б", "Считаем: 4. Ответ: Б) 4", "Это 4. Ответ: 4", "Ошибка. Ответ: А"]
    row = {"question": "2 + 2?\nА) 3\nБ) 4\nВ) 5", "answer": "Б", "samples": said}
    question = load_questions(write(tmp_path / "rows.jsonl", [row])).questions[0]
    assert (question.task, question.majority, question.votes) == ("choice", "4", {"4": 3, "3": 1})


def test_options_that_differ_in_brackets_are_voted_on_apart(tmp_path: Path) -> None:
    text = "Where is sqrt(x(1-x)) real?\n(A) (0, 1)\n(B) [0, 1)\n(C) (0, 1]\n(D) [0, 1]"
    samples = [{"rationale": f"Reason {place}.", "answer": said} for place, said in enumerate(["D", "A", "(A)"])]
    row = {"question": text, "answer": "D", "samples": samples}
    result = load_questions(write(tmp_path / "rows.jsonl", [row]))
    assert result.questions[0].votes == {"(0, 1)": 2, "[0, 1]": 1}
    assert result.summary.majority_wrong_against_gold == 1 and len(result.questions[0].negatives) == 1
