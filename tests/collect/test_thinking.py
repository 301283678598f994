"""Teachers that think: their reasoning is kept wherever a server puts it, is never voted on, and is paid once."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from tests.support import fake_teacher as fake
from tests.support import teacher_forms as forms
from tests.support.collecting import command, ledger, quick, rows, run

__all__ = ["quick"]
WHY, SAID = "Perhaps the answer is {wrong}? No, I multiply and get {a}, try {i}.", "The answer is {a}."


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    pairs = ((3, 4), (6, 7), (8, 5))
    lines = [
        {"id": f"q{a}", "question": f"A bag holds {a} nuts. How many are in {b} bags?", "answer": str(a * b)}
        for a, b in pairs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def prepared(questions: Path, *more: str) -> list[dict[str, Any]]:
    output = questions.with_name("train.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        assert entry(["prepare", str(questions.with_name("samples.jsonl")), "--output", str(output), *more]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda name: name.replace(" ", "-"))
def test_reasoning_is_kept_in_every_form(form: str, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the request to rows that are trained on: the answer is that of the content, the rationale the reasoning."""
    with fake.serving(forms.thinking(forms.FORMS[form], WHY, SAID)) as server:
        result = run(capsys, command(questions, server.url, "--num-samples", "3"))
    assert (result["samples"], result["requests"], result["unreadable_answers"], result["without_rationale"]) == (
        9,
        3,
        0,
        0,
    )
    for row in rows(questions):
        assert {sample["answer"] for sample in row["samples"]} == {row["answer"]}
        for sample in row["samples"]:
            assert (
                sample["rationale"].startswith("Perhaps")
                and sample["rationale"].endswith(".")
                and "<" not in sample["rationale"]
            )
    for row in prepared(questions):
        assert (row["majority"], row["votes"]) == (row["gold"], {row["gold"]: 3})
        assert len(row["positives"]) == 3 and all("I multiply" in positive["text"] for positive in row["positives"])


def test_the_whole_message_goes_into_the_ledger(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(forms.thinking(forms.FORMS["openrouter"], WHY, SAID)) as server:
        run(capsys, command(questions, server.url, "--num-samples", "2"))
    sample = ledger(questions, "reply")[0]["samples"][0]
    assert sample["message"]["reasoning_details"][0]["signature"] == "c2ln" and sample["message"]["role"] == "assistant"
    assert sample["text"].startswith("<think>\nPerhaps") and sample["text"].endswith(sample["message"]["content"])
    assert ledger(questions, "reply")[0]["usage"] == {"prompt_tokens": 10, "completion_tokens": 40}


def test_thinking_chooses_the_rationale_and_is_chosen_again_for_nothing(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another --thinking reads the ledger again; prepare chooses again between a rationale and the reasoning beside
    it."""
    own = "Bags times nuts gives {a}, way {i}.\nAnswer: {a}"
    with fake.serving(forms.thinking(forms.FORMS["openrouter"], WHY, own)) as server:
        args = command(questions, server.url, "--num-samples", "2")
        run(capsys, args)
        auto = rows(questions)[0]["samples"][0]
        assert auto["rationale"].startswith("Bags times") and auto["reasoning"].startswith("Perhaps")
        assert {p["text"][:10] for row in prepared(questions) for p in row["positives"]} == {"Bags times"}
        assert {p["text"][:7] for row in prepared(questions, "--thinking", "only") for p in row["positives"]} == {
            "Perhaps"
        }
        for option, begins, ends in (
            ("only", "Perhaps", "."),
            ("keep", "Perhaps", "."),
            ("drop", "Bags", "."),
            ("auto", "Bags", "."),
        ):
            result = run(capsys, [*args, "--thinking", option])
            assert result["requests"] == 3 and result["samples"] == 6
            sample = rows(questions)[0]["samples"][0]
            assert sample["rationale"].startswith(begins) and sample["rationale"].endswith(ends), option
            assert ("Bags" in sample["rationale"]) == (option != "only") and ("reasoning" in sample) == (
                option == "auto"
            )
            assert sample["answer"] == "12"
        assert rows(questions)[0]["samples"][0] == auto
    assert len(server.seen) == 3


CUT = {
    "null content": {"content": None, "reasoning_content": "I multiply and then"},
    "open tag": {"content": "<think>\nmaybe the answer is 13, let me"},
    "hidden reasoning": {"content": ""},
    "details": {"content": None, "reasoning_details": [{"type": "reasoning.text", "text": "I mul"}]},
    "parts": {"content": [{"type": "thinking", "thinking": "The answer is 7, or"}]},
}


@pytest.mark.parametrize("message", CUT.values(), ids=CUT)
def test_a_cut_thought_is_paid_once(
    message: dict[str, Any], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One request a question, now and when the command runs again; more tokens are advised, and only these asked for
    again."""
    with fake.serving(forms.cut(message)) as server:
        args = command(questions, server.url, "--num-samples", "3")
        for _ in range(2):
            result = run(capsys, args, 1)
            assert len(server.seen) == result["requests"] == 3 and result["completion_tokens"] == 9 * 512
            assert "raise --max-tokens (512)" in result["log"] and "temperature" not in result["log"]
            assert (result["cut_before_an_answer"], result["failures"]) == (9, {})
        assert (
            entry(["prepare", str(questions.with_name("samples.jsonl")), "-o", str(questions.with_name("x.jsonl"))])
            == 2
        )
        capsys.readouterr()
        server.usual = forms.thinking(forms.FORMS["deepseek, sglang, llama.cpp"], WHY, SAID)
        result = run(capsys, [*args, "--max-tokens", "4096"])
        assert (result["samples"], result["cut_before_an_answer"], result["requests"]) == (9, 0, 6)
        assert {seen.body["max_tokens"] for seen in server.seen[3:]} == {4096}
        assert "max_tokens 4096, now it is 512" in run(capsys, args, 2)["log"]
    assert [row["majority"] for row in prepared(questions)] == ["12", "42", "40"]


def test_only_what_was_cut_is_asked_for_again(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def half(handler: fake.Handler, seen: fake.Seen) -> None:
        short = seen.body["max_tokens"] == 512
        said = [
            ("I multiply", "length") if short and i == 1 else (f"Way {i}.\nAnswer: {forms.product(seen)}", "stop")
            for i in range(3)
        ]
        handler.send_json({"choices": [fake.choice(text, finish=finish) for text, finish in said[: seen.body["n"]]]})

    with fake.serving(half) as server:
        args = command(questions, server.url, "--num-samples", "3")
        result = run(capsys, args)
        assert "3 of 9 samples were cut before an answer" in result["log"] and result["missing"] == 0
        assert Counter("cut" in sample for row in rows(questions) for sample in row["samples"]) == {False: 6, True: 3}
        result = run(capsys, [*args, "--max-tokens", "900"])
        assert (result["samples"], result["requests"]) == (9, 6) and [seen.body["n"] for seen in server.seen[3:]] == [
            1,
            1,
            1,
        ]
        assert all(sample["answer"] == row["answer"] for row in rows(questions) for sample in row["samples"])


def test_cut_after_cut_stops_before_much_is_paid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {i} times 2?", "answer": str(2 * i)}) + "\n" for i in range(40))
    )
    with fake.serving(forms.cut(CUT["null content"])) as server:
        result = run(capsys, command(path, server.url, "--max-failures", "4", "--concurrency", "2"), 1)
    assert "4 replies in a row were cut before an answer; raise --max-tokens" in result["log"] and len(server.seen) <= 6


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": None, "reasoning": "It is 12, so the answer is 12."}, "finish_reason": "stop"},
        {"message": {"content": None, "refusal": "I cannot help with 12 bags."}, "finish_reason": "stop"},
        {"message": {"content": None, "refusal": "I cannot help. The answer is 12."}, "finish_reason": "stop"},
        {"message": {"content": "So far 3 + 9 = 12"}, "finish_reason": "content_filter"},
        {"message": {"content": None}, "finish_reason": "content_filter"},
    ],
    ids=["reasoning alone", "refusal", "refusal that seems to answer", "broken off", "filtered"],
)
def test_a_reply_without_content_is_not_asked_for_again(
    choice: dict[str, Any], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was paid and will not come out better; what stands in its reasoning is no answer."""
    with fake.serving(lambda handler, seen: handler.send_json({"choices": [choice] * seen.body["n"]})) as server:
        result = run(capsys, command(questions, server.url, "--num-samples", "2"))
    assert len(server.seen) == 3 and (result["samples"], result["unreadable_answers"], result["failures"]) == (6, 6, {})
    assert "no answer that can be read" in result["log"] and "temperature" not in result["log"]
    assert ledger(questions, "reply")[0]["samples"][0]["message"] == choice["message"]


def test_answers_without_reasoning_are_not_blamed_on_the_temperature(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a teacher that hides its reasoning: all samples are the same short answer."""
    with fake.serving(forms.thinking(forms.FORMS["vllm, groq, ollama"], "", "{a}")) as server:
        log = run(capsys, command(questions, server.url))["log"]
    assert "15 of 15 samples have an answer and no rationale" in log and "temperature" not in log


def test_reasoning_of_the_completions_api(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(handler: fake.Handler, seen: fake.Seen) -> None:
        choices = [
            {"text": f"\n{forms.product(seen)}", "reasoning": f"I multiply, way {i}.", "finish_reason": "stop"}
            for i in range(5)
        ]
        handler.send_json({"choices": choices})

    with fake.serving(behave) as server:
        run(capsys, command(questions, server.url, "--api", "completions"))
    assert [row["votes"] for row in prepared(questions)] == [{"12": 5}, {"42": 5}, {"40": 5}]


@pytest.mark.parametrize(
    "content",
    [
        "variant {i}. So we get $\\boxed{{{a}}}$.",
        "**Explanation:** multiply, variant {i}.\n\n**Answer:** {a}\n\nLet me know!",
    ],
)
def test_plain_teachers(content: str, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain: forms.Form = lambda why, said: {"role": "assistant", "content": said}  # noqa: E731
    with fake.serving(forms.thinking(plain, "", content, n=False)) as server:
        result = run(capsys, command(questions, server.url, "--num-samples", "3"))
    assert (result["samples"], result["requests"]) == (9, 9)
    assert [(row["votes"], len(row["positives"])) for row in prepared(questions)] == [
        ({n: 3}, 3) for n in ("12", "42", "40")
    ]
    assert "message" not in ledger(questions, "reply")[0]["samples"][0]  # the text is all of it


def test_tokens_that_the_total_alone_counts_are_charged(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some servers leave reasoning out of completion_tokens; a router says what a request cost."""
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 530, "cost": 0.25}
    body = {"choices": [fake.choice("Because.\nAnswer: 12")], "usage": usage}
    with fake.serving(lambda handler, seen: handler.send_json(body)) as server:
        result = run(capsys, command(questions, server.url, "--num-samples", "1"))
        assert (result["completion_tokens"], result["cost"]) == (3 * 520, 0.75)
        priced = run(capsys, command(questions, server.url, "--num-samples", "1", "--price-output", "1000"))
    assert priced["cost"] == pytest.approx(1.56)


def test_a_ledger_of_before_goes_on(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records without reasoning, message, usage and thinking; a cut sample among them is asked for again with more
    tokens."""
    with fake.serving(forms.thinking(forms.FORMS["deepseek, sglang, llama.cpp"], WHY, SAID)) as server:
        args = command(questions, server.url, "--num-samples", "2")
        run(capsys, args)
        path = questions.with_name("samples.jsonl.ledger.jsonl")
        old = []
        for record in ledger(questions):
            record.pop("thinking", None), record.pop("usage", None)
            for sample in record.get("samples", []):
                sample.pop("message", None), sample.pop("reasoning", None)
            old.append(record)
        cut = next(record for record in old if record["kind"] == "reply")["samples"][0]
        cut |= {"rationale": "I mul", "answer": None, "text": "I mul", "cut": True}
        path.write_text("".join(json.dumps(record) + "\n" for record in old), encoding="utf-8")
        assert run(capsys, args)["requests"] == 3
        result = run(capsys, [*args, "--max-tokens", "1024", "--thinking", "only"])
        assert (result["requests"], result["samples"], result["unreadable_answers"]) == (4, 6, 0)


def test_messages_that_are_hard_to_keep(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Deep nesting, numbers that no JSON has, lone surrogates, reasoning of a wrong type, a router's broken choice."""
    deep = '{"a": [' * 300 + "1" + "]}" * 300
    odd = f'"role": "assistant", "x": {deep}, "y": NaN, "reasoning": {deep}, "reasoning_content": 7, "thinking": true'
    good = f'{{"message": {{{odd}, "content": "Lone \\ud800.\\nAnswer: 12"}}, "finish_reason": "stop"}}'
    broken = '{"message": {"content": "Half a rea"}, "finish_reason": "error"}'
    body = f'{{"choices": [{broken}, {good}], "usage": {{"cost": -1, "z": {deep}}}}}'.encode()
    with fake.serving(fake.raw(body)) as server:
        args = command(questions, server.url, "--num-samples", "1")
        result = run(capsys, args)
        assert (result["samples"], result["faults"], len(server.seen)) == (
            3,
            {"error in it": 3},
            3,
        ) and "cost" not in result
        assert run(capsys, args)["requests"] == 3
    assert {(s["rationale"], s["answer"]) for row in rows(questions) for s in row["samples"]} == {("Lone ?.", "12")}
    assert "NaN" not in questions.with_name("samples.jsonl.ledger.jsonl").read_text(encoding="utf-8")
