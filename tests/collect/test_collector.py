"""`collect`: what it writes, how it goes on, what it stops for; the server is a fake one on loopback."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from qcrd_fast.data.load import load_questions, validate_file
from tests.support import fake_teacher as fake
from tests.support.collecting import command, ledger, rows, run, start, wait_for, write_questions
from tests.support.collecting import questions as questions
from tests.support.collecting import quick as quick

# What it writes


def test_samples_of_every_question_and_a_ledger(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        result = run(capsys, command(questions, server.url, "--price-input", "2", "--price-output", "10"))
    assert (result["questions"], result["complete"], result["samples"], result["missing"]) == (6, 6, 30, 0)
    assert (result["requests"], result["prompt_tokens"], result["completion_tokens"]) == (6, 60, 600)
    assert result["cost"] == pytest.approx((60 * 2 + 600 * 10) / 1e6) and result["estimated_replies"] == 0
    assert [row["id"] for row in rows(questions)] == [f"q{i}" for i in range(6)]
    assert rows(questions)[2]["answer"] == "3" and rows(questions)[2]["task"] == "number"
    sample = rows(questions)[2]["samples"][4]
    assert sample == {"rationale": sample["rationale"], "answer": "4", "source": "m"}
    assert not list(validate_file(questions.with_name("samples.jsonl")))
    assert len(load_questions(questions.with_name("samples.jsonl")).questions) == 6
    kinds = [record["kind"] for record in ledger(questions)]
    assert Counter(kinds) == {"start": 1, "intent": 6, "reply": 6} and kinds[:2] == ["start", "intent"]
    assert {seen.request for seen in server.seen} == {record["request"] for record in ledger(questions, "intent")}
    seen = server.seen[0]
    assert seen.path == "/v1/chat/completions" and "authorization" not in seen.headers
    wanted = {"model": "m", "n": 5, "temperature": 0.7, "max_tokens": 512, "stream": False}
    assert {key: seen.body[key] for key in wanted} == wanted and "What is" in seen.prompt and "Answer: " in seen.prompt


def test_n_is_asked_for_again_until_enough_came(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(fake.samples(honours_n=False, usage=False)) as server:
        result = run(capsys, command(questions, server.url))
    assert (result["samples"], result["requests"], result["estimated_replies"]) == (30, 30, 30)
    assert Counter(seen.body["n"] for seen in server.seen) == dict.fromkeys((5, 4, 3, 2, 1), 6)
    assert result["completion_tokens"] > 0


def test_more_choices_than_asked_are_counted_and_dropped(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(
        lambda handler, seen: handler.send_json({"choices": [fake.choice("A.\nAnswer: 1")] * 7})
    ) as server:
        result = run(capsys, command(questions, server.url))
    assert (
        result["samples"] == 30
        and result["faults"] == {"surplus": 12}
        and all(len(r["samples"]) == 5 for r in rows(questions))
    )


def test_a_server_that_refuses_n_is_asked_for_one(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_only(handler: fake.Handler, seen: fake.Seen) -> None:
        (fake.samples() if seen.body["n"] == 1 else fake.status(400, "Only one completion choice is allowed"))(
            handler, seen
        )

    with fake.serving(one_only) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1"))
    assert result["samples"] == 30 and result["failures"] == {"400": 1} and len(server.seen) == 31


def test_a_teacher_that_repeats_itself_is_reported(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(fake.samples(texts=lambda seen, i: "Always this.\nAnswer: 1")) as server:
        result = run(capsys, command(questions, server.url))
    assert result["questions_all_the_same"] == 6 and "ignore the temperature" in result["log"]


def test_different_samples_raise_no_alarm(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        assert "ignore the temperature" not in run(capsys, command(questions, server.url))["log"]


def test_completions(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        assert run(capsys, command(questions, server.url + "/completions", "--api", "completions"))["samples"] == 30
    assert {seen.path for seen in server.seen} == {"/v1/completions"} and "messages" not in server.seen[0].body


def test_extra_body_adds_and_takes_out(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = '{"top_p": 0.9, "max_tokens": null, "max_completion_tokens": 99}'
    with fake.serving() as server:
        run(capsys, command(questions, server.url, "--extra-body", extra))
    body = server.seen[0].body
    assert (body["top_p"], body["max_completion_tokens"]) == (0.9, 99) and "max_tokens" not in body


def test_unreadable_answers_are_kept_and_counted(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(seen: fake.Seen, i: int) -> Any:
        return ("I do not know.", "So much to say", "Two.\nAnswer: 2", "Lone \ud800 and \0.\nAnswer: 2", "Answer: 2")[i]

    with fake.serving(fake.samples(texts=say)) as server:
        result = run(capsys, command(questions, server.url))
    assert (result["unreadable_answers"], result["without_rationale"]) == (12, 6)
    assert [s["answer"] for s in rows(questions)[0]["samples"]] == [None, None, "2", "2", "2"]
    assert not list(validate_file(questions.with_name("samples.jsonl")))
    assert load_questions(questions.with_name("samples.jsonl")).summary.answers_dropped == 12


def test_the_one_model_of_a_server_is_found(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def offers(*names: str) -> fake.Behaviour:
        return lambda handler, seen: handler.send_json({"data": [{"id": name} for name in names]})

    args = [a for a in command(questions, "URL") if a not in ("--teacher-model", "m", "--deadline", "20")]
    with fake.serving() as server:
        args[args.index("URL")] = server.url
        server.plan = [offers("a", "b")]
        assert "offers 2 models (a, b)" in run(capsys, args, 2)["log"]
        server.plan = [offers("tiny")]
        run(capsys, args)
    assert server.seen[-1].body["model"] == "tiny" and rows(questions)[0]["samples"][0]["source"] == "tiny"
    assert {seen.request for seen in server.seen} == {record["request"] for record in ledger(questions, "intent")}


def test_dry_run_shows_a_prompt_and_what_it_would_take(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        prices = ("--price-input", "1000000", "--price-output", "1000000")
        shown = run(capsys, command(questions, server.url, "--dry-run", "--num-samples", "3", *prices))
        assert entry(command(questions, server.url, "--dry-run")) == 0
    assert server.seen == [] and sorted(p.name for p in questions.parent.iterdir()) == ["questions.jsonl"]
    assert "What is 0 + 1?" in shown["prompt"] and shown["request"]["messages"][0]["content"] == shown["prompt"]
    tokens = shown["prediction"]
    assert (tokens["questions"], tokens["samples"], tokens["requests"], tokens["requests_if_n_is_ignored"]) == (
        6,
        18,
        6,
        18,
    )
    assert tokens["completion_tokens_at_most"] == 18 * 512
    assert tokens["cost"] == tokens["prompt_tokens"] + tokens["completion_tokens"]
    out = capsys.readouterr().out
    assert "What is 0 + 1?" in out and "The cost is not known" in out
    table = [line.split() for line in out.splitlines()]
    assert ["requests", "6", "30"] in table and ["samples", "30"] in table
    assert any(row[:2] == ["completion", "tokens"] and row[3] == f"{30 * 512:,}" for row in table)


# Going on


def test_the_same_command_asks_for_nothing_twice(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        run(capsys, command(questions, server.url))
        before = questions.with_name("samples.jsonl").read_bytes()
        again = run(capsys, command(questions, server.url))
        assert len(server.seen) == 6 and again["requests"] == 6 and again["samples"] == 30
        assert questions.with_name("samples.jsonl").read_bytes() == before
        more = run(capsys, command(questions, server.url, "--num-samples", "7"))
        assert more["samples"] == 42 and {seen.body["n"] for seen in server.seen[6:]} == {2}
        write_questions(questions, 8)
        assert run(capsys, command(questions, server.url, "--num-samples", "7"))["samples"] == 56
    assert len(server.seen) == 14 and len(rows(questions)) == 8


def test_a_cut_last_line_is_dropped(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        run(capsys, command(questions, server.url))
        path = questions.with_name("samples.jsonl.ledger.jsonl")
        lines = path.read_bytes().splitlines(keepends=True)
        last = json.loads(lines[-1])
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
        result = run(capsys, command(questions, server.url))
        assert "cut line" in result["log"] and result["samples"] == 30 and result["lost_in_flight"] == 1
        assert result["estimated_replies"] == 1 and result["completion_tokens"] > 600  # what was lost is charged, too
        assert server.seen[-1].prompt == next(seen.prompt for seen in server.seen if seen.request == last["request"])
    assert len(server.seen) == 7 and all(json.loads(line) for line in path.read_text().splitlines())


def test_other_settings_or_prompts_are_not_mixed(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.txt"
    template.write_text("Say it: {question} {{}}", encoding="utf-8")
    with fake.serving() as server:
        args = command(questions, server.url)
        run(capsys, args)
        assert "temperature 0.7, now it is 1.0" in run(capsys, [*args, "--temperature", "1"], 2)["log"]
        assert "model 'm', now it is 'other'" in run(capsys, [*args, "--teacher-model", "other"], 2)["log"]
        assert "another prompt" in run(capsys, [*args, "--template", str(template)], 2)["log"]
        for number, body in (("6", "{}"), ("7", '{"top_p": 0.9}'), ("8", '{"top_p": 0.9}')):
            log = run(capsys, [*args, "--num-samples", number, "--extra-body", body])["log"]
            assert ("--extra-body is not what" in log) == (number == "7")  # less effort, say: no other samples
        write_questions(questions, 5)
        assert "'q5', which is not in --questions" in run(capsys, args, 2)["log"]
    assert len(server.seen) == 4 * 6


def test_what_is_no_ledger_is_left_alone(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, beside = questions.with_name("samples.jsonl"), questions.with_name("samples.jsonl.ledger.jsonl")
    args = command(questions, "http://127.0.0.1:9/v1")
    output.write_text("precious\n")
    assert "has no ledger beside it" in run(capsys, args, 2)["log"]
    assert output.read_text() == "precious\n" and not beside.exists()
    beside.write_text('{"kind": "start"}\n{"some": "row"}\n')
    assert f"{beside}:2: no record of a ledger" in run(capsys, args, 2)["log"]
    assert beside.read_text() == '{"kind": "start"}\n{"some": "row"}\n' and output.read_text() == "precious\n"


@pytest.mark.parametrize("written", [0, 30])
def test_a_full_disk_stops_with_whole_lines(
    questions: Path, written: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        if not data.startswith(b'{"kind": '):
            return real(file, data)
        calls.append(data)
        if len(calls) < 8:
            return real(file, data)
        if not written:
            raise OSError(28, "No space left on device")
        return real(file, data[:written])

    with fake.serving() as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert "space left" in run(capsys, command(questions, server.url, "--concurrency", "2"), 1)["log"].lower()
        assert len(ledger(questions)) == 7
        assert run(capsys, command(questions, server.url))["samples"] == 30


def test_two_collectors_do_not_share_a_file(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(fake.samples(delay_s=1.0)) as server:
        other = start(command(questions, server.url))
        wait_for(lambda: server.seen)
        assert f"is in use by process {other.pid}" in run(capsys, command(questions, server.url), 2)["log"]
        other.kill()
        other.wait()


# Limits and signals


def test_the_request_limit(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        server.plan = [fake.status(500)]
        result = run(capsys, command(questions, server.url, "--max-requests", "4", "--concurrency", "2"), 75)
        assert len(server.seen) == result["requests"] == 4 and result["samples"] in (15, 20)
        assert run(capsys, command(questions, server.url, "--max-requests", "0"), 75)["requests"] == 4
        assert run(capsys, command(questions, server.url))["samples"] == 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_is_in_flight(questions: Path, number: signal.Signals, capsys: Any) -> None:
    with fake.serving(fake.samples(delay_s=1.5)) as server:
        process = start(command(questions, server.url, "--concurrency", "2", "--json"))
        wait_for(lambda: len(server.seen) == 2)
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 128 + number, err
        assert json.loads(out)["samples"] == 10 and len(server.seen) == 2 and len(rows(questions)) == 2
        server.usual = fake.samples()
        assert run(capsys, command(questions, server.url))["requests"] == 6


def test_a_signal_does_not_wait_for_a_retry(questions: Path) -> None:
    with fake.serving(fake.status(429, retry_after="18")) as server:
        process = start(command(questions, server.url, "--concurrency", "2", "--json"))
        wait_for(lambda: len(server.seen) == 2)
        time.sleep(0.2)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
        assert (
            process.returncode == 130 and time.monotonic() - begun < 14 and json.loads(out)["failures"] == {"429": 2}
        ), err


def test_in_flight_is_given_up_after_the_grace_and_a_second_signal_quits(questions: Path) -> None:
    with fake.serving(fake.hang) as server:
        process = start(command(questions, server.url, "--grace", "0.3", "--json"))
        wait_for(lambda: server.seen)
        process.terminate()
        out, err = process.communicate(timeout=100)
        assert process.returncode == 143 and json.loads(out)["failures"] == {"cancelled": 6}, err
        process = start(command(questions, server.url, "--grace", "60"))
        wait_for(lambda: len(server.seen) == 12)
        process.terminate()
        wait_for(lambda: "a second one ends" in (process.stderr.readline() if process.stderr else ""))
        process.terminate()
        process.communicate(timeout=100)
        assert process.returncode == 143


def test_a_placeholder_for_a_key_is_no_secret(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server without keys is often given one of a few letters or digits; no sample may lose them."""
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    with fake.serving(fake.samples(texts=lambda seen, i: f"10 + {i} is {10 + i}.\nAnswer: {10 + i}")) as server:
        run(capsys, command(questions, server.url))
    assert [s["answer"] for s in rows(questions)[0]["samples"]] == ["10", "11", "12", "13", "14"]
    assert "***" not in questions.with_name("samples.jsonl.ledger.jsonl").read_text(encoding="utf-8")


def test_a_pipe_is_no_output(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = questions.with_name("samples.jsonl")
    os.mkfifo(pipe)
    with fake.serving() as server:
        assert "is a device or pipe" in run(capsys, command(questions, server.url), 2)["log"]
    assert pipe.is_fifo() and not server.seen


def test_a_config_gives_the_extra_body_as_a_mapping(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = questions.with_name("collect.yaml")
    config.write_text("extra-body: {top_p: 0.9, n: null}\n", encoding="utf-8")
    with fake.serving(fake.samples(honours_n=False)) as server:
        run(capsys, command(questions, server.url, "--config", str(config)))
    assert server.seen[0].body["top_p"] == 0.9 and "n" not in server.seen[0].body
