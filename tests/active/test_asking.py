"""Asking: the budget is never passed, whoever is asked and however many requests are in flight; nothing is asked for
twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time

import pytest

from qcrd_fast.active.asking import Asking, Conversation, Limits
from qcrd_fast.active.ledger import FRAME_TOKENS, ActiveLedger
from qcrd_fast.active.prompts import Prompts
from qcrd_fast.active.revision import Explanation
from qcrd_fast.active.teachers import OracleTeacher, ReplayTeacher
from qcrd_fast.collect import endpoint
from qcrd_fast.collect.endpoint import EndpointSettings
from qcrd_fast.data.schema import Question, text_key
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.signals import StopSignals
from tests.support import fake_teacher
from tests.support.active_runs import write

MAX_TOKENS = 40


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.02)


def conversations(count: int, mode: str = "repair", round: int = 1) -> list[Conversation]:
    said = Explanation("2 + 3 = 5. 5 - 1 = 3.", "3")
    prompts = Prompts()
    return [
        Conversation(
            round,
            Question(f"q{i}", f"What is 2 + 3 - 1 in the case {i}?", gold="4", task="number"),
            said,
            mode,
            prompts,
        )
        for i in range(count)
    ]


def judge(handler: fake_teacher.Handler, seen: fake_teacher.Seen) -> None:
    """The first step is right, the second wrong; used as many tokens as it may, and a frame around the prompt."""
    text = "right" if "There is no step" in seen.prompt else "wrong: no\n5 - 1 = 4.\nAnswer: 4"
    tokens = {"prompt_tokens": len(seen.prompt.encode()) + FRAME_TOKENS, "completion_tokens": seen.body["max_tokens"]}
    handler.server.released.wait(0.01)
    handler.send_json({"choices": [fake_teacher.choice(text)], "usage": tokens})


def ask(path, server, talks, budget, round_tokens=None, concurrency=8, round=1):
    settings = EndpointSettings(
        server.url, model="m", max_tokens=MAX_TOKENS, concurrency=concurrency, deadline_s=5.0, timeout_s=2.0
    )
    with ActiveLedger(path) as ledger, StopSignals() as signals:
        ledger.start({"model": "m", "api": "chat", "temperature": 0.0, "max_tokens": MAX_TOKENS})
        asking = Asking(round, ledger, Limits(budget, round_tokens, MAX_TOKENS), signals)
        asyncio.run(asking.converse(talks, settings))
        return asking.exhausted, ledger.total, ledger.by_purpose()


@pytest.mark.parametrize("budget", [900, 2500, 5000, 100_000])
def test_concurrent_requests_never_pass_the_budget(tmp_path, budget):
    talks = conversations(12)
    with fake_teacher.serving(judge) as server:
        exhausted, spent, purposes = ask(tmp_path / "ledger.jsonl", server, talks, budget)
        served = sum(len(seen.prompt.encode()) + FRAME_TOKENS + MAX_TOKENS for seen in server.seen)
    assert served == spent <= budget and purposes == {"revise": spent}
    done = [t.outcome for t in talks if t.outcome]
    assert all(o.result == "kept" and o.text == "2 + 3 = 5. 5 - 1 = 4." for o in done)
    assert (exhausted, len(done)) == (None, 12) if budget > 50_000 else (exhausted == "budget" and len(done) < 12)


def test_a_round_ends_at_its_own_limit(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with fake_teacher.serving(judge) as server:
        first = ask(path, server, conversations(12), 100_000, 2500)
        second = ask(path, server, conversations(12, round=2), 100_000, 2500, round=2)
    assert first[0] == second[0] == "round"
    assert first[1] <= 2500 and first[1] < second[1] <= first[1] + 2500


def test_what_failed_counts_as_reserved(tmp_path):
    talks = conversations(4)
    with fake_teacher.serving(judge) as server:
        server.plan = [fake_teacher.half_closed, fake_teacher.raw(b"{}"), fake_teacher.status(500)]
        _, spent, _ = ask(tmp_path / "ledger.jsonl", server, talks, 100_000)
        sent = [len(seen.prompt.encode()) + FRAME_TOKENS + MAX_TOKENS for seen in server.seen]
    assert all(t.outcome and t.outcome.result == "kept" for t in talks)
    assert sum(sent) - max(sent) <= spent <= sum(sent)  # a 500 was not worked on


def test_what_was_in_flight_at_a_kill_counts_as_reserved_and_is_asked_again(tmp_path):
    path, talks = tmp_path / "ledger.jsonl", conversations(1)
    with ActiveLedger(path) as ledger:  # no end is written
        ledger.start({"model": "m", "api": "chat", "temperature": 0.0, "max_tokens": MAX_TOKENS})
        ledger.send(1, talks[0].key, talks[0].request, MAX_TOKENS, 1)
    with ActiveLedger(path) as ledger:
        lost = ledger.total
        assert lost == ledger.most(talks[0].request, MAX_TOKENS) and ledger.totals.lost == 1
    with fake_teacher.serving(judge) as server:
        _, spent, _ = ask(path, server, talks, 100_000)
        assert len(server.seen) == 2 and spent > lost
    assert talks[0].outcome.result == "kept"


def test_replies_that_are_written_down_are_not_asked_for_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with fake_teacher.serving(judge) as server:
        talks = conversations(5)
        ask(path, server, talks, 3500)
        asked, before = len(server.seen), [t.outcome.to_dict() for t in talks if t.outcome]
        again = conversations(5)
        ask(path, server, again, 100_000)
        assert len(server.seen) == 10  # two a question
    assert asked < 10 and [t.outcome.to_dict() for t in again][: len(before)] == before


def test_another_prompt_is_not_answered_by_an_old_reply(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with fake_teacher.serving(judge) as server:
        ask(path, server, conversations(1), 100_000)
        with pytest.raises(InputError, match="another prompt"):
            ask(path, server, conversations(1, "rewrite"), 100_000)


def test_malformed_verdicts_are_counted_and_not_asked_again(tmp_path):
    talks = conversations(3)
    with fake_teacher.serving(fake_teacher.samples(texts=lambda seen, i: "It could be right.")) as server:
        ask(tmp_path / "ledger.jsonl", server, talks, 100_000)
        assert len(server.seen) == 3
    assert [t.outcome.result for t in talks] == ["unreadable verdict"] * 3


def test_a_server_that_refuses_stops_the_run(tmp_path):
    with fake_teacher.serving(fake_teacher.status(404)) as server, pytest.raises(RunError, match="404"):
        ask(tmp_path / "ledger.jsonl", server, conversations(3), 100_000)


def test_questions_that_fail_one_after_the_other_stop_the_run(tmp_path):
    with (
        fake_teacher.serving(fake_teacher.status(400)) as server,
        pytest.raises(RunError, match="10 questions in a row failed"),
    ):
        ask(tmp_path / "ledger.jsonl", server, conversations(30), 100_000, concurrency=1)


def test_a_server_that_never_replies_is_no_round(tmp_path):
    """The questions are asked again when it does; one that fails among others is passed over."""
    path, talks = tmp_path / "ledger.jsonl", conversations(3)
    none = pytest.raises(RunError, match=r"no request has brought a reply, the last one: .*400")
    with fake_teacher.serving(fake_teacher.status(400)) as server, none:
        ask(path, server, talks, 100_000)
    talks = conversations(3)
    with fake_teacher.serving(judge) as server:
        server.plan = [fake_teacher.status(400)]
        ask(path, server, talks, 100_000)
    assert sorted(t.outcome.result for t in talks) == ["kept", "kept", "request failed"]


def test_requests_run_side_by_side(tmp_path):
    most, now, lock = [0], [0], threading.Lock()

    def behave(handler, seen):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        judge(handler, seen)

    with fake_teacher.serving(behave) as server:
        ask(tmp_path / "ledger.jsonl", server, conversations(8), 100_000, concurrency=4)
    assert 2 <= most[0] <= 4


# Teachers that answer at once

ORACLE = [
    {
        "question": f"What is 2 + 3 - 1 in the case {i}?",
        "answer": "4",
        "solutions": [["2 + 3 = 5.", "5 - 1 = 4."], ["First 2 + 3 = 5.", "Then 5 - 1 = 4."]],
    }
    for i in range(12)
]


def hold(path, teacher, talks, budget, round_tokens=None):
    with ActiveLedger(path) as ledger, StopSignals() as signals:
        ledger.start({"model": "m", "api": "oracle", "temperature": 0.0, "max_tokens": MAX_TOKENS})
        asking = Asking(1, ledger, Limits(budget, round_tokens, MAX_TOKENS), signals)
        asking.hold(talks, teacher)
        return asking.exhausted, ledger.total


def test_an_oracle_knows_the_true_steps(tmp_path):
    teacher = OracleTeacher(str(write(tmp_path / "oracle.jsonl", ORACLE)))
    talks = conversations(2)
    assert hold(tmp_path / "ledger.jsonl", teacher, talks, 100_000)[0] is None
    for talk in talks:
        assert (talk.outcome.text, talk.outcome.wrong_step, talk.outcome.result) == ("2 + 3 = 5. 5 - 1 = 4.", 2, "kept")
    right = Conversation(
        1, talks[0].question, Explanation("First 2 + 3 = 5. Then 5 - 1 = 4.", "4"), "repair", Prompts()
    )
    wrong = Conversation(
        1, talks[1].question, Explanation("First 3 + 2 = 5. Then 5 - 1 = 4.", "5"), "rewrite", Prompts()
    )
    hold(tmp_path / "other.jsonl", teacher, [right, wrong], 100_000)
    assert right.outcome.result == "no fault"
    # the answer behind the last step is not its result
    assert (wrong.outcome.wrong_step, wrong.outcome.result) == (2, "kept")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_resume_keeps_what_a_long_first_request_brought(tmp_path, batch):
    """The first request reserves far more than it takes, which is no room that the last ones had."""
    path = write(tmp_path / "oracle.jsonl", ORACLE)

    def talks() -> list[Conversation]:
        found = conversations(12)
        long = dataclasses.replace(found[0].question, context="The numbers are whole. " * 40)
        return [Conversation(1, long, Explanation("2 + 3 = 5. 5 - 1 = 3.", "3"), "repair", Prompts()), *found[1:]]

    teacher = OracleTeacher(str(path))
    teacher.solutions |= {text_key(t.question): next(iter(teacher.solutions.values())) for t in talks()}
    teacher.batch = batch
    done = talks()
    expected = hold(tmp_path / "whole.jsonl", teacher, done, 4000)
    told = [t.outcome and t.outcome.to_dict() for t in done]
    assert expected[0] == "budget" and told[0] and told[-1] is None
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        cut, again = tmp_path / f"{count}.jsonl", talks()
        cut.write_bytes(b"".join(lines[:count]))
        assert hold(cut, teacher, again, 4000) == expected, count
        assert [t.outcome and t.outcome.to_dict() for t in again] == told


@pytest.mark.parametrize("batch", [1, 3])
def test_a_resume_meets_the_end_of_the_budget_at_the_same_request(tmp_path, batch):
    teacher = OracleTeacher(str(write(tmp_path / "oracle.jsonl", ORACLE)))
    teacher.batch = batch
    path, talks = tmp_path / "ledger.jsonl", conversations(12)
    exhausted, spent = hold(path, teacher, talks, 2500)
    lines = path.read_bytes().splitlines(keepends=True)
    told = [t.outcome and t.outcome.to_dict() for t in talks]
    assert exhausted == "budget" and 0 < spent <= 2500 and told[0] and told[-1] is None
    for count in range(1, len(lines)):
        cut = tmp_path / f"{count}.jsonl"
        cut.write_bytes(b"".join(lines[:count]))
        again = conversations(12)
        assert hold(cut, teacher, again, 2500) == (exhausted, spent)
        assert [t.outcome and t.outcome.to_dict() for t in again] == told
        records = [json.loads(line) for line in cut.read_text().splitlines()]
        assert [r["id"] for r in records if r["kind"] == "reply"] == [json.loads(x)["id"] for x in lines[1:]]


def test_earlier_samples_are_fresh_rationales(tmp_path):
    rows = [{"question": "What is 2 + 3 - 1 in the case 0?", "samples": [{"rationale": "5 - 1 = 4.", "answer": "4"}]}]
    teacher = ReplayTeacher(str(write(tmp_path / "samples.jsonl", rows)))
    [talk, other] = conversations(2, "new")
    assert teacher.knows(talk.question) and not teacher.knows(other.question)
    hold(tmp_path / "ledger.jsonl", teacher, [talk], 100_000)
    assert (talk.outcome.text, talk.outcome.result) == ("5 - 1 = 4.", "kept")


@pytest.mark.parametrize(
    "row", ['{"question": "x"}', "[]", "{", '{"question": "x", "answer": "1", "solutions": [["a"], ["b", "c"]]}']
)
def test_a_bad_row_of_an_oracle_is_named(tmp_path, row):
    path = tmp_path / "oracle.jsonl"
    path.write_text(json.dumps(ORACLE[0]) + "\n" + row + "\n")
    with pytest.raises(InputError, match=r"oracle\.jsonl:2: .*expected"):
        OracleTeacher(str(path))
