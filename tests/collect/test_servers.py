"""What servers refuse and ask for: parameters, money, patience; headers, queries and system prompts of the user's
own."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from qcrd_fast.collect import progress
from qcrd_fast.collect.credentials import looks_secret, read_pairs, without_secrets
from qcrd_fast.collect.events import assemble, is_events
from qcrd_fast.collect.progress import duration
from qcrd_fast.collect.refusals import (
    advice_on_length,
    advice_on_money,
    read_error,
    refused_parameter,
    refuses_several,
    refuses_system,
    wait_s,
    wants_money,
    wants_stream,
)
from qcrd_fast.collect.reply import parse_reply
from qcrd_fast.data.messages import read_message
from qcrd_fast.errors import InputError
from tests.support import fake_teacher as fake
from tests.support import teacher_forms as forms
from tests.support.collecting import command, ledger, questions, quick, rows, run

__all__ = ["questions", "quick"]
SENT = ("n", "temperature", "max_tokens", "stream")
KEY = "azure0secret0key0123456789"


def said(message: str, **more: Any) -> str:
    return json.dumps({"error": {"message": message, **more}})


# What errors mean


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (
            said("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
                 param="max_tokens", code="unsupported_parameter"),
            "max_tokens",
        ),
        (said("'max_tokens' is not supported with this model"), "max_tokens"),
        (said("Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
        "supported.",
              param="temperature", code="unsupported_value"), "temperature"),
        (said("invalid temperature: only 1 is allowed for this model"), "temperature"),
        (said("`temperature` is deprecated for this model."), "temperature"),
        (said("`temperature` may only be set to 1 when thinking is enabled"), "temperature"),
        (said("This model does not support temperature"), "temperature"),
        ('{"detail": [{"type": "extra_forbidden", "loc": ["body", "n"], "msg": "Extra inputs are not permitted"}]}',
        "n"),
        ('{"object": "error", "message": "Unrecognized request argument supplied: stream"}', "stream"),
        (said("property 'n' is unsupported"), "n"),
        (said("temperature must be between 0 and 1", param="temperature"), None),
        (said("max_tokens is too large: 100000. The model supports at most 16384 tokens", param="max_tokens"), None),
        (said("'max_tokens' is too large: 512. This model's maximum context length is 256 tokens"), None),
        (said("The model `m` does not exist"), None),
        (said("isn't it not supported"), None),
        ("no JSON: not supported", None),
        ("[]", None),
    ],
)  # fmt: skip
def test_refused_parameters(body: str, name: str | None) -> None:
    assert refused_parameter(read_error(body), SENT) == name


@pytest.mark.parametrize(
    ("body", "several", "system"),
    [
        (said("Only one completion choice is allowed"), True, False),
        (said("'n' : number must be at most 1", param="n"), True, False),
        (said("System role not supported"), False, True),
        (said("Unsupported value: 'messages[0].role' does not support 'system' with this model."), False, True),
        (said("the prompt is too long"), False, False),
    ],
)
def test_refused_choices_and_roles(body: str, several: bool, system: bool) -> None:
    assert (refuses_several(read_error(body)), refuses_system(read_error(body))) == (several, system)


@pytest.mark.parametrize(
    ("status", "body", "money"),
    [
        (429, said("You exceeded your current quota, please check your plan.", type="insufficient_quota"), True),
        (429, said("You exceeded your current quota, please check your plan and billing details.", code=429,
                   status="RESOURCE_EXHAUSTED", details=[{"retryDelay": "34s"}]), False),
        (429, said("Rate limit reached. Please try again in 20s. Add a payment method at https://a.example/billing",
                   code="rate_limit_exceeded"), False),
        (429, said("Rate limit reached, see https://a.example/billing", code="rate_limit_exceeded"), False),
        (429, said("Your account is suspended", type="exceeded_current_quota_error"), True),
        (429, '{"error": {"code": "1113", "message": "\u4f59\u989d\u4e0d\u8db3"}}', True),
        (402, '{"error": {"message": "Insufficient Balance", "type": "unknown_error"}}', True),
        (402, "Payment required", True),
        (403, said("Your team has used all available credits"), True),
        (400, said("Access denied", code="Arrearage"), True),
        (400, said("A bill was overdue: insufficient balance, the question said"), False),
        (429, said("Too many requests"), False),
        (500, said("insufficient_quota"), False),
    ],
)  # fmt: skip
def test_money_is_told_from_patience(status: int, body: str, money: bool) -> None:
    assert wants_money(status, read_error(body), wait_s({}, body)) is money


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "7"}, "", 7),
        ({"retry-after-ms": "250", "retry-after": "1"}, "", 0.25),
        ({}, "Please try again in 1m2.5s.", 62.5),
        ({}, "Please retry after 40 seconds", 40),
        ({}, "Please try again in 500ms", 0.5),
        ({}, '"retryDelay": "34s"', 34),
        ({"retry-after": "-3"}, "", 0),
        ({"retry-after": "soon"}, "try again later", None),
        ({"retry-after": "nan"}, "", None),
    ],
)
def test_waits(headers: dict[str, str], body: str, seconds: float | None) -> None:
    assert wait_s(headers, body) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("message", "stream"),
    [
        ("This model only support stream mode, please enable the stream parameter to access the model", True),
        ("parameter.enable_thinking must be set to false for non-streaming calls", True),
        ("Streaming is required for requests of this length", True),
        ("Unrecognized request argument supplied: stream", False),
    ],
)
def test_models_that_only_stream(message: str, stream: bool) -> None:
    assert wants_stream(read_error(said(message))) is stream


@pytest.mark.parametrize(
    "body",
    ["", "7", "[]", "[[]]", "null", "[" * 100_000, '{"error": [1, null]}', '{"detail": [{"loc": 5}, 7]}',
     '{"error": {"message": {}, "code": [1], "param": 3}}', '{"detail": [{"loc": [], "msg": null}]}',
     '{"error": {"metadata": {"raw": 7}}}'],
)  # fmt: skip
def test_errors_of_any_shape_are_text(body: str) -> None:
    error = read_error(body)
    assert all(isinstance(part, str) for part in error) and refused_parameter(error, SENT) is None
    assert not wants_money(429, error, wait_s({}, body)) and not refuses_system(error) and not wants_stream(error)


def test_advice_on_length() -> None:
    assert "--max-tokens (512)" in advice_on_length(read_error(said("maximum context length is 256 tokens")), 512)
    assert "--max-tokens (9)" in advice_on_length(read_error(said("too large", param="max_tokens")), 9)
    assert advice_on_length(read_error(said("no such model")), 512) == ""


# What the collector makes of them


def o_like(handler: fake.Handler, seen: fake.Seen) -> None:
    """A model that takes neither max_tokens nor a temperature nor a system prompt."""
    for name, message in (
        (
            "max_tokens",
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
        ),
        (
            "temperature",
            "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
            "supported.",
        ),
    ):
        if name in seen.body:
            return forms.error(400, message, param=name, code="unsupported_parameter")(handler, seen)
    if seen.body["messages"][0]["role"] == "system":
        message = "Unsupported value: 'messages[0].role' does not support 'system' with this model."
        return forms.error(400, message, param="messages[0].role", code="unsupported_value")(handler, seen)
    return fake.samples()(handler, seen)


def test_parameters_that_a_model_refuses_are_changed(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(o_like) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1", "--system-prompt", "Be brief."))
    assert (result["samples"], result["failures"], result["complete"]) == (30, {"400": 3}, 6) and len(server.seen) == 9
    body = server.seen[-1].body
    assert body["max_completion_tokens"] == 512 and not {"max_tokens", "temperature"} & body.keys()
    assert [message["role"] for message in body["messages"]] == ["user"] and body["messages"][0]["content"].startswith(
        "Be brief.\n\n"
    )
    assert result["log"].count("the teacher refuses max_tokens") == result["log"].count("no system prompt") == 1
    assert "refuses temperature 0.7, so its own is used" in result["log"]


def test_several_workers_learn_it_together(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(o_like) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "6"))
    assert result["samples"] == 30 and result["failures"]["400"] <= 12 and result["missing"] == 0
    assert result["log"].count("the teacher refuses max_tokens") == 1


def test_a_model_that_only_streams(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reasoning, content and usage come in pieces; a stream that breaks off is no reply."""
    pieces = [
        {"role": "assistant", "reasoning_content": "One ", "content": None},
        {"reasoning_content": "and one."},
        {"content": "The answer", "reasoning_details": [{"type": "reasoning.encrypted"}]},
        {"content": " is 2.", "reasoning_details": [{"type": "reasoning.encrypted"}]},
    ]
    parts = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None} for delta in pieces]
    parts.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}
    lines = [": keep-alive", "", *(f"data: {json.dumps(part)}" for part in [*parts, usage]), "data: [DONE]", ""]
    stream = "\n\n".join(lines).encode()

    def behave(handler: fake.Handler, seen: fake.Seen) -> None:
        if not seen.body["stream"]:
            return forms.error(400, "This model only support stream mode, please enable the stream parameter.")(
                handler, seen
            )
        assert seen.body["stream_options"] == {"include_usage": True} and seen.body["n"] == 1
        return handler.send(200, stream, content_type="text/event-stream; charset=utf-8")

    with fake.serving(behave) as server:
        args = command(questions, server.url, "--concurrency", "1", "--num-samples", "2")
        server.plan = [
            behave,
            fake.raw(b"data: {\n", content_type="text/event-stream"),
            fake.raw(b"\n\n".join(stream.split(b"\n\n")[:5])),
        ]
        result = run(capsys, args)
    assert (result["samples"], result["failures"]) == (12, {"400": 1, "bad reply: not JSON": 2})
    assert (result["prompt_tokens"], result["estimated_replies"]) == (
        12 * 5 + 2 * ledger(questions, "intent")[1]["prompt_tokens"],
        2,
    )
    assert {(s["rationale"], s["answer"]) for row in rows(questions) for s in row["samples"]} == {("One and one.", "2")}
    message = ledger(questions, "reply")[0]["samples"][0]["message"]
    assert len(message["reasoning_details"]) == 2 and message["role"] == "assistant"


def test_an_error_within_a_stream(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = b'data: {"choices": [{"index": 0, "delta": {"content": "Ha"}}]}\n\n'
    body += b'data: {"error": {"code": 402, "message": "no credits"}}\n\n'
    with fake.serving(fake.raw(body, content_type="text/event-stream")) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1"), 1)
    assert "no credit left" in result["log"] and len(server.seen) == 1


def test_what_the_user_asks_for_is_not_left_out(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An option of --extra-body that is refused is an error, not a change of mind."""
    with fake.serving(forms.error(400, "Unsupported parameter: 'top_k'", param="top_k")) as server:
        result = run(capsys, command(questions, server.url, "--extra-body", '{"top_k": 5}', "--max-failures", "2"), 1)
    assert all(seen.body["top_k"] == 5 for seen in server.seen) and "top_k" in result["log"]


def test_a_model_without_n(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def strict(handler: fake.Handler, seen: fake.Seen) -> None:
        if "n" in seen.body:
            detail = [{"type": "extra_forbidden", "loc": ["body", "n"], "msg": "Extra inputs are not permitted"}]
            return handler.send_json({"detail": detail}, 422)
        return handler.send_json({"choices": [fake.choice(f"Way {len(handler.server.seen)}.\nAnswer: 1")]})

    with fake.serving(strict) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1", "--num-samples", "2"))
    assert (result["samples"], result["failures"]) == (12, {"422": 2}) and "n" not in server.seen[-1].body


@pytest.mark.parametrize(
    "behave",
    [
        forms.error(429, "You exceeded your current quota.", type="insufficient_quota", code="insufficient_quota"),
        forms.error(402, "Insufficient Balance"),
        lambda handler, seen: handler.send_json({"error": {"code": 402, "message": "Insufficient credits"}}),
    ],
    ids=["quota", "balance", "within 200"],
)
def test_a_used_up_quota_stops_at_once(
    behave: fake.Behaviour, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake.serving(behave) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "2"), 1)
        assert len(server.seen) <= 2 and "no credit left" in result["log"] and "no credit left" in result["stopped"]
        server.usual = fake.samples()
        assert run(capsys, command(questions, server.url))["samples"] == 30


def test_a_rate_limit_is_waited_for(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As long as the words of the error say, and where the status is 200 and the error within."""
    with fake.serving() as server:
        server.plan = [
            forms.error(429, "Rate limit reached. Please try again in 700ms.", code="rate_limit_exceeded"),
            lambda handler, seen: handler.send_json({"error": {"code": 429, "message": "slow down, retry in 0.5s"}}),
        ]
        result = run(capsys, command(questions, server.url, "--concurrency", "1"))
    assert (result["samples"], result["failures"]) == (30, {"429": 2})
    assert server.seen[1].time - server.seen[0].time > 0.65 and server.seen[2].time - server.seen[1].time > 0.45


def test_too_long_for_the_model_names_the_option(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "This model's maximum context length is 256 tokens. However, you requested 612 tokens"
    with fake.serving(forms.error(400, message, code=400)) as server:
        result = run(capsys, command(questions, server.url), 1)
    assert (
        "lower --max-tokens (512) or shorten the prompt" in result["log"]
        and message in result["log"]
        and len(server.seen) == 6
    )


# Headers, query, system prompt


def test_azure(questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A key in a header of its own, from the environment, a version in the query, a deployment in the path."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else-0123456789")
    monkeypatch.setenv("AZURE_KEY", KEY)
    with fake.serving() as server:
        url = server.url.replace("/v1", "/openai/deployments/d")
        more = ("--header", "api-key: ${AZURE_KEY}", "--query", "api-version=2024-10-21")
        assert run(capsys, command(questions, url, *more))["samples"] == 30
        assert entry([*command(questions, url, *more), "--num-samples", "6", "--dry-run"]) == 0
    seen = server.seen[0]
    assert seen.path == "/openai/deployments/d/chat/completions?api-version=2024-10-21"
    assert seen.headers["api-key"] == KEY and "authorization" not in seen.headers
    out = capsys.readouterr().out
    assert "api-version=2024-10-21" in out and "api-key: ***" in out and KEY not in out


def test_a_config_gives_headers_as_a_mapping(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = questions.with_name("collect.yaml")
    config.write_text(
        "header: {X-Title: trial, x-b: c}\nquery: [a=1, b=x y]\nsystem-prompt: Be brief.\n", encoding="utf-8"
    )
    with fake.serving() as server:
        run(capsys, command(questions, server.url, "--config", str(config)))
    assert (server.seen[0].headers["x-title"], server.seen[0].headers["x-b"]) == ("trial", "c")
    assert server.seen[0].path in ("/v1/chat/completions?a=1&b=x+y", "/v1/chat/completions?a=1&b=x%20y")
    assert server.seen[0].body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_system_prompt_is_part_of_the_prompt(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "system.txt").write_text("Think hard.\n", encoding="utf-8")
    with fake.serving() as server:
        run(capsys, command(questions, server.url, "--system-prompt", f"@{tmp_path / 'system.txt'}"))
        assert server.seen[0].body["messages"][0]["content"] == "Think hard."
        assert "another prompt" in run(capsys, command(questions, server.url), 2)["log"]
        refused = run(capsys, command(questions, server.url, "--system-prompt", "@/no/such/file"), 2)
        assert "no readable UTF-8 file" in refused["log"] and len(server.seen) == 6
        completions = command(questions, server.url, "--system-prompt", "Hm.", "--api", "completions")
        assert "--system-prompt belongs to a chat" in run(capsys, completions, 2)["log"]


def test_keys_in_headers_and_queries_come_out_nowhere(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a server says back: in errors, in samples, in reasoning, in a model's name; also from a traceback."""
    token, other, query = "hdr0topsecret0123456789", "swordfish-1234", "q0topsecret0123456789"

    def echo(handler: fake.Handler, seen: fake.Seen) -> None:
        everything = f"{seen.headers} {seen.path}"
        if "What is 0" in seen.prompt:
            handler.send_json({"error": {"message": everything}}, 500)
        elif "What is 1" in seen.prompt:
            handler.send_json({"error": everything}, 400)
        else:
            message = {
                "content": f"You said {everything}.\nAnswer: 1",
                "reasoning": everything,
                "x": {everything: [everything]},
            }
            handler.send_json({"choices": [{"message": message}], "usage": {"note": everything}})

    more = ("--header", f"authorization: Bearer {token}", "--header", f"X-Custom={other}", "--query", f"key={query}")
    words = ""
    with fake.serving(echo) as server:
        args = command(questions, server.url, *more, "--num-samples", "1")
        for extra in (("--deadline", "1"), ("--dry-run",), ("--header", "no value"), ("--header", f"host: {token}")):
            entry([*args, *extra])
            words += "".join(capsys.readouterr())
        server.usual = fake.status(401, f"bad {token} {query} {other}")
        assert entry([*args, "--num-samples", "2", "--deadline", "1"]) == 1
        words += "".join(capsys.readouterr())
    assert "says 401" in words and any(token in str(seen.headers) and query in seen.path for seen in server.seen)
    written = "".join(path.read_text() for path in questions.parent.glob("samples.jsonl*"))
    assert "You said" in written and "failure" in written and "***" in written
    for secret in (token, other, query):
        assert secret not in words and secret not in written


def test_an_unexpected_error_does_not_print_a_header(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcrd_fast.collect.endpoint import Endpoint

    async def broken(self: Endpoint, *args: Any) -> Any:
        raise LookupError(f"headers {dict(self._client.headers) if self._client else ''}")

    monkeypatch.setattr(Endpoint, "_exchange", broken)
    assert entry(command(questions, "http://127.0.0.1:9/v1", "--header", f"X-Custom: {KEY}")) == 1
    out, err = capsys.readouterr()
    assert "LookupError" in err and "x-custom" in err and KEY not in out + err


def test_a_plain_header_takes_no_word_out_of_a_sample(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, addresses and versions are no secrets: a rationale may say the same words."""
    more = (
        "--header",
        "X-Title: qcrd-fast",
        "--header",
        "HTTP-Referer: https://a.example/distil",
        "--header",
        "v-version: 2023-06-01",
    )
    said = "By qcrd-fast, https://a.example/distil, on 2023-06-01.\nAnswer: 3"
    with fake.serving(fake.samples(texts=lambda seen, i: said)) as server:
        run(capsys, command(questions, server.url, *more, "--num-samples", "1"))
    assert rows(questions)[0]["samples"][0]["rationale"] == said.splitlines()[0]


def test_pairs() -> None:
    assert read_pairs("--header", ["A: b: c", "d=e=f", " g :h "]) == (("A", "b: c"), ("d", "e=f"), ("g", "h"))
    for given, says in (
        (["no separator"], "expected NAME: VALUE"),
        (["Content-Length: 3"], "no header that can be given"),
        (["a b: c"], "expected NAME: VALUE"),
        (["a:"], "the value is empty"),
        (["a: caf\u00e9"], "cannot be sent"),
        (["a: x\r\nb: c"], "cannot be sent"),
        (["a: ${NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE is not set"),
    ):
        with pytest.raises(InputError, match=says):
            read_pairs("--header", given)
    assert (
        looks_secret("api-key", "x")
        and looks_secret("x-any", "abc-1234")
        and not looks_secret("api-version", "2024-preview-1")
    )


def test_a_key_in_a_header_stays_on_encrypted_ways(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--header", f"x-key: {KEY}"), ("--query", f"key={KEY}")):
        log = run(capsys, command(questions, "http://teacher.example/v1", option, value), 2)["log"]
        assert "would go to teacher.example unencrypted" in log and KEY not in log
    assert entry([*command(questions, "http://teacher.example/v1", "--header", "X-Title: trial"), "--dry-run"]) == 0


# Progress and prediction


def test_progress_says_eta_and_cost(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.1)
    monkeypatch.setattr(progress, "PROGRESS_S", 0.1)
    with fake.serving(fake.samples(delay_s=0.3)) as server:
        prices = ("--price-input", "0", "--price-output", "10000")  # a request: 100 tokens, cost 1
        log = run(capsys, command(questions, server.url, "--concurrency", "1", *prices))["log"]
        assert "0 of 30 samples, 1 request, ETA unknown, cost 0 so far" in log
        assert "10 of 30 samples" in log and re.search(r"ETA \d+ s, cost 2 so far of about 6\n", log)
        log = run(capsys, command(questions, server.url, "--concurrency", "1", "--num-samples", "6"))["log"]
    assert "34 of 36 samples" in log and "tokens so far" in log


def test_progress_stays_in_place_on_a_terminal(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "TERMINAL_S", 0.1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with fake.serving(fake.samples(delay_s=0.3)) as server:
        log = run(capsys, command(questions, server.url, "--concurrency", "1"))["log"]
    assert "\r\x1b[K0 of 30 samples" in log and ", ETA " in log and "INFO 0 of 30" not in log


def test_durations() -> None:
    assert [duration(s) for s in (3.4, 89, 90, 3000, 7500)] == ["3 s", "89 s", "2 min", "50 min", "2 h 05 min"]


def test_the_prediction_is_a_table(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ("--price-input", "1", "--price-output", "2")
    assert entry([*command(questions, "https://a.example", "--dry-run", *prices)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected, most = next((float(row[1]), float(row[2])) for row in table if row[:1] == ["cost"])
    assert 0 < expected < most == pytest.approx((30 * 512 * 2 + 30 * 60) / 1e6, rel=0.1)
    assert ["requests", "6", "30"] in table


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"data: [DONE]\n\n",
        b"data: 7\n\n",
        b'data: {"choices": [7]}\n\n',
        b'data: {"choices": [{"index": "a", "delta": {}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n',
    ],
)
def test_events_that_are_no_reply(body: bytes) -> None:
    with pytest.raises(ValueError):
        assemble(body)


def test_many_events_take_no_longer_than_their_length() -> None:
    count = 100_000
    body = b'data: {"choices": [{"delta": {"content": "abcdefgh"}}]}\n' * count
    body += b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n'
    begun = time.process_time()
    assert len(assemble(body)["choices"][0]["message"]["content"]) == 8 * count
    assert time.process_time() - begun < 60


# Errors that come as replies, and what is one question's fault alone


def given(*texts: str, **more: Any) -> bytes:
    return json.dumps({"choices": [fake.choice(text) for text in texts], **more}).encode()


def one_choice(handler: fake.Handler, seen: fake.Seen) -> None:
    """As llama.cpp's server once did: the fault of a request with the status of a fault of its own."""
    if seen.body["n"] > 1:
        return forms.error(500, "Only one completion choice is allowed", type="server_error", code=500)(handler, seen)
    return handler.send(200, given(f"Way {len(handler.server.seen)}.\nAnswer: 1"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": "Unexpected endpoint or method. (POST /chat/completions)"}, "Unexpected endpoint or method"),
        ({"error": {"message": "Model m is overloaded", "type": "server_error"}}, "Model m is overloaded"),
        ({"base_resp": {"status_code": 1004, "status_msg": "login fail"}, "choices": None}, "login fail"),
        ({"object": "error", "message": "Only m2 is served", "code": 40301}, "Only m2 is served"),
        ({"choices": [{"error": {"code": 502, "message": "Idle timeout"}, "finish_reason": "error"}]}, "Idle timeout"),
    ],
    ids=["a string", "no code", "a vendor's own", "an object", "of a choice"],
)
def test_an_error_with_status_200_is_said(
    body: dict[str, Any], words: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake.serving(lambda handler, seen: handler.send_json(body)) as server:
        result = run(capsys, command(questions, server.url, "--max-failures", "1", "--concurrency", "1"), 1)
    assert words in result["stopped"] and len(server.seen) == 3  # it may have been paid: no more than BAD_REPLIES


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "No quota", "code": "insufficient_quota"}}, "no credit left"),
        ({"error": {"message": "Who are you?", "code": "401"}}, "set OPENAI_API_KEY"),
        ({"choices": [{"error": {"code": 402, "message": "Broke"}, "finish_reason": "error"}]}, "no credit left"),
    ],
)
def test_a_fatal_error_with_status_200_stops_at_once(
    body: dict[str, Any], words: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake.serving(lambda handler, seen: handler.send_json(body)) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1"), 1)
    assert words in result["stopped"] and len(server.seen) == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "This request requires more credits, or fewer max_tokens. You can only afford 40.",
            "lower --max-tokens (512)",
        ),
        ("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 requests", "in a day"),
        ("Insufficient balance", "no credit left"),
    ],
)
def test_what_helps_where_money_is_short(message: str, words: str) -> None:
    assert words in advice_on_money(read_error(said(message)), 512)


def test_a_deployment_that_is_not_found(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(forms.error(404, "Resource not found", code="404")) as server:
        address = f"{server.url.removesuffix('/v1')}/openai/deployments/D"
        assert "--query api-version=" in run(capsys, command(questions, address), 1)["stopped"]


@pytest.mark.parametrize("finish", ["content_filter", "content_filter: PROHIBITED_CONTENT", "SAFETY", "refusal"])
def test_a_reply_that_was_filtered_is_paid_once(finish: str) -> None:
    choice = {"message": {"role": "assistant", "content": None}, "finish_reason": finish}
    reply = parse_reply({"choices": [choice]}, "p")
    assert [sample.text for sample in reply.choices] == [""] and not reply.faults


def test_a_key_that_is_refused_with_status_400(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse = forms.error(400, "API key not valid. Please pass a valid API key.", type="INVALID_ARGUMENT")
    with fake.serving(refuse) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1"), 1)
    assert "set OPENAI_API_KEY" in result["stopped"] and len(server.seen) == 1


def test_a_flagged_question_does_not_stop_the_others(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def moderated(handler: fake.Handler, seen: fake.Seen) -> None:
        if "What is 0" in seen.prompt:
            message = 'm requires moderation. Your input was flagged for "violence"'
            return forms.error(403, message, code=403, metadata={"reasons": ["violence"]})(handler, seen)
        return fake.samples()(handler, seen)

    with fake.serving(moderated) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1"))
    assert (result["complete"], result["failures"], len(server.seen)) == (5, {"403": 1}, 6) and "flagged" in result[
        "log"
    ]


def test_words_of_a_question_in_an_error_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.jsonl"
    asked = ("What temperature has the stream of n choices?", "What is 1 + 1?")
    path.write_text("".join(json.dumps({"question": text, "answer": "2"}) + "\n" for text in asked), encoding="utf-8")

    def policy(handler: fake.Handler, seen: fake.Seen) -> None:
        if "temperature" in seen.prompt:
            return forms.error(400, f"Not allowed, see the policy: {seen.prompt[:60]}")(handler, seen)
        return fake.samples()(handler, seen)

    with fake.serving(policy) as server:
        result = run(capsys, command(path, server.url, "--concurrency", "1"))
    assert (result["samples"], len(server.seen)) == (5, 2) and server.seen[1].body["temperature"] == 0.7
    assert (
        refused_parameter(read_error(said("'temperature' is not supported")), SENT, "What temperature?")
        == "temperature"
    )
    assert not refuses_several(read_error(said("Bad input: 'the choices\\n are'"))) and refuses_several(
        read_error(said("n: Input should be 1; it must not be 5"))
    )


@pytest.mark.parametrize(
    "message",
    ["Developer instruction is not enabled for models/g", "Conversation roles must alternate user/assistant/..."],
)
def test_other_words_for_no_system_prompt(message: str, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def strict(handler: fake.Handler, seen: fake.Seen) -> None:
        alone = seen.body["messages"][0]["role"] == "user"
        return (fake.samples() if alone else forms.error(400, message))(handler, seen)

    with fake.serving(strict) as server:
        assert run(capsys, command(questions, server.url, "--system-prompt", "Be brief."))["samples"] == 30
    assert not refuses_system(read_error(said("Unexpected system error")))


def test_a_server_that_blames_itself_for_n(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(one_choice) as server:
        result = run(capsys, command(questions, server.url, "--concurrency", "1", "--num-samples", "2"))
    assert (result["samples"], result["failures"]) == (12, {"500": 1})


def test_a_server_that_always_says_now(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Retry-After: 0 is no reason to ask five times a second."""
    args = ("--max-failures", "1", "--concurrency", "1", "--deadline", "3")
    with fake.serving(fake.status(429, "slow down", retry_after="0")) as server:
        run(capsys, command(questions, server.url, *args), 1)
    assert len(server.seen) < 14


def test_bodies_that_are_hard_to_read(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte order mark, a character that was cut in its middle, and an error page."""
    good = given(*["Half a \u20ac.\nAnswer: 1"] * 5)
    with fake.serving(fake.raw(b"\xef\xbb\xbf" + good)) as server:
        assert run(capsys, command(questions, server.url, "--max-requests", "1"), 75)["samples"] == 5
        server.usual = fake.raw(good.replace(b"\\u20ac", b"\xe2\x82"))
        assert run(capsys, command(questions, server.url, "--max-requests", "2"), 75)["samples"] == 10
    assert read_error('\ufeff{"error": {"message": "no"}}').message == "no"
    assert read_error("<html><head><title>502 Bad\nGateway</title></head>" + "x" * 999).message == "502 Bad\nGateway"
    assert read_error("<html>").message == "an HTML page"


def test_models_in_a_bare_list(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def together(handler: fake.Handler, seen: fake.Seen) -> None:
        return handler.send_json([{"id": "only"}]) if seen.path.endswith("/models") else fake.samples()(handler, seen)

    with fake.serving(together) as server:
        args = [word for word in command(questions, server.url) if word not in ("--teacher-model", "m")]
        assert run(capsys, args)["samples"] == 30 and server.seen[-1].body["model"] == "only"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"completion_tokens": 5000}, (True, 10, 5000)),
        ({"total_tokens": 5000}, (True, 10, 4990)),
        ({"input_tokens": 7, "output_tokens": 5000}, (False, 7, 5000)),
        ({"prompt_tokens": 7.0, "completion_tokens": 8.0}, (False, 7, 8)),
    ],
)
def test_usage_in_part_is_no_reason_to_charge_less(usage: dict[str, Any], tokens: tuple[bool, int, int]) -> None:
    reply = parse_reply({"choices": [fake.choice("abcd")], "usage": usage}, "p" * 40)
    assert (reply.estimated, reply.prompt_tokens, reply.completion_tokens) == tokens


def test_hidden_thoughts_that_were_cut_are_charged_in_full() -> None:
    reply = parse_reply({"choices": [fake.choice(None, finish="length")] * 2}, "p", str, 512)
    assert (reply.estimated, reply.completion_tokens) == (True, 1024)


# Streams


def events(*deltas: dict[str, Any], first: str = "") -> bytes:
    parts: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    parts.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return (first + "".join(f"data: {json.dumps(part, ensure_ascii=False)}\r\n\r\n" for part in parts)).encode()


def test_lines_of_a_stream_end_at_line_feeds_alone() -> None:
    text = "So\u2028it\x85 is.\x0c"
    assert assemble(events({"content": text}))["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("first", [": OPENROUTER PROCESSING\n\n", "event: message\n", "\ufeff", "\n\nid: 7\n"])
def test_streams_are_known_by_their_first_line(first: str) -> None:
    body = events({"content": "Ha"}, first=first)
    assert is_events("application/octet-stream", body) and assemble(body)["choices"][0]["message"]["content"] == "Ha"
    assert not is_events("text/event-stream", b' {"choices": []}') and is_events("text/event-stream", b"")


def test_parts_of_a_stream_are_put_together() -> None:
    """Thoughts that come word by word are one text; content may be parts first and strings then."""

    def thought(text: str) -> dict[str, Any]:
        return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}

    whole = assemble(
        events({"content": ""}, {"content": [thought("Three ")]}, {"content": [thought("fours.")]},
        {"content": "It is "},
               {"content": "12."})
    )  # fmt: skip
    assert read_message(whole["choices"][0]["message"]) == ("Three fours.", "It is 12.")
    details = [{"type": "reasoning.text", "text": text, "index": 0} for text in ("Three ", "fours.")]
    details += [
        {"type": "reasoning.encrypted", "data": "A", "index": 1},
        {"type": "reasoning.encrypted", "data": "B", "index": 1},
    ]
    whole = assemble(events(*({"reasoning_details": [detail]} for detail in details), {"content": "12"}))
    assert read_message(whole["choices"][0]["message"]) == ("Three fours.", "12")
    assert len(whole["choices"][0]["message"]["reasoning_details"]) == 3


def test_an_error_that_is_an_event() -> None:
    assert assemble(b'data: {"object": "error", "message": "busy", "code": 503}\n\n')["error"]["message"] == "busy"


# Secrets


ECHOED = '{"api_key": "AIzaSyDextra0123456", "provider": {"secret": "s3cr3tvalue99"}, "stop": ["</answer>"]}'


def test_keys_in_the_body_or_encoded_in_an_address_come_out_nowhere(
    questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def echo(handler: fake.Handler, seen: fake.Seen) -> None:
        text = f"{seen.path} {json.dumps(seen.body)}"
        if len(handler.server.seen) == 1:
            return forms.error(400, text)(handler, seen)
        return handler.send(200, given(f"{text}</answer>\nAnswer: 1"))

    key = "AIzaSyD+a/b=c0123456789xyz"
    with fake.serving(echo) as server:
        args = command(questions, server.url, "--query", f"key={key}", "--extra-body", ECHOED)
        shown = json.dumps(run(capsys, [*args, "--dry-run"]))
        assert not server.seen
        shown += json.dumps(run(capsys, args))
    files = "".join(path.read_text(encoding="utf-8") for path in questions.parent.iterdir())
    for secret in (key, "AIzaSyD%2B", "AIzaSyDextra0123456", "s3cr3tvalue99"):
        assert secret not in shown + files, secret
    assert server.seen[0].body["api_key"] == "AIzaSyDextra0123456" and "</answer>" in files


@pytest.mark.parametrize("name", ["max_tokens", "stop_token", "prompt_cache_key", "tokenizer", "eos_token", "authors"])
def test_fields_that_are_no_keys(name: str) -> None:
    assert without_secrets({name: "abcdefgh1234"}) == {name: "abcdefgh1234"}


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("http://127.0.0.1:9/v1?key=s3cr3tvalue99", "--seed has no meaning"),
        ("u:s3cr3tvalue99@127.0.0.1:9/v1", "begins with http"),
        ("localhost:9/v1?key=s3cr3tvalue99", "begins with http"),
        ("api.example.com/v1", "begins with http"),
    ],
)
def test_addresses_in_messages_hold_no_key(
    teacher: str, words: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["collect", "--questions", str(questions), "-o", str(questions.with_name("samples.jsonl")), "--seed", "3"]
    log = run(capsys, [*args, "--teacher", teacher, "--teacher-model", "m"], 2)["log"]
    assert words in log and "s3cr3t" not in log


def test_what_a_server_says_moves_no_cursor(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving(forms.error(400, "bad \x1b[2J thing")) as server:
        log = run(capsys, command(questions, server.url), 1)["log"]
    assert "bad ?[2J thing" in log and "\x1b" not in log


@pytest.mark.parametrize("option", [("--system-prompt", "x\udcff"), ("--extra-body", '{"stop": "\\ud800"}')])
def test_text_that_cannot_be_sent(option: tuple[str, str], questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        assert "no UTF-8" in run(capsys, command(questions, server.url, *option), 2)["log"] and not server.seen
