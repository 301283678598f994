"""Reliability, trials 19 to 21: teachers that fail in every way there is, killed collectors, secrets."""

from __future__ import annotations

import email.utils
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.main import entry
from qcrd_fast.collect import endpoint
from qcrd_fast.collect.endpoint import Endpoint, EndpointSettings, base_url
from qcrd_fast.collect.reply import parse_reply
from qcrd_fast.errors import InputError
from tests.support import fake_teacher as fake
from tests.support.collecting import command, ledger, questions, quick, rows, run, start, wait_for, write_questions

KEY = "sk-topsecret0123456789abcdef"
__all__ = ["questions", "quick"]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A file of one question."""
    return write_questions(tmp_path / "questions.jsonl", 1)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.jsonl", 2)


class TestTrial19:
    """Retries under one deadline; 4xx not retried; the key never leaves for another host; bad replies recorded, not
    fatal."""

    @pytest.mark.parametrize(
        ("trouble", "reason"),
        [
            (fake.status(408), "408"),
            (fake.status(409), "409"),
            (fake.status(429), "429"),
            (fake.status(500), "500"),
            (fake.status(503), "503"),
            (fake.half_closed, "broken off"),
            (fake.no_reply, "broken off"),
            (fake.raw(b'{"choices": [{"message": {"con'), "bad reply: not JSON"),
            (fake.raw(b"<!doctype html><p>Sign in", content_type="text/html"), "bad reply: HTML"),
            (fake.raw(b"[" * 200_000), "bad reply: not JSON"),
            (fake.raw(b"\xff\xfe\x00"), "bad reply: not JSON"),
            (fake.raw(b"[]"), "bad reply: no choices"),
            (fake.raw(b'{"choices": []}'), "bad reply: empty choices"),
            (fake.raw(b'{"choices": [7, null]}'), "bad reply: null content"),
            (
                fake.raw(b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'),
                "bad reply: null content",
            ),
            (fake.raw(b'{"error": {"message": "overloaded"}}'), "bad reply: error in it"),
            (fake.raw(b"not gzip", content_encoding="gzip"), "bad reply: broken compression"),
            (fake.raw(b"?", content_encoding="zstd"), "bad reply: unknown encoding"),
        ],
    )
    def test_trouble_that_passes_is_recorded_and_costs_one_request(
        self, one: Path, trouble: Any, reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with fake.serving() as server:
            server.plan = [trouble]
            result = run(capsys, command(one, server.url))
        assert result["samples"] == 5 and result["failures"] == {reason: 1} and len(server.seen) == 2
        failure, *_ = ledger(one, "failure")
        assert failure["request"] == server.seen[0].request and failure["id"] == "q0"

    def test_a_reply_with_fewer_samples_and_one_null_is_used(
        self, one: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        some = {"choices": [fake.choice("A.\nAnswer: 1"), fake.choice(None), fake.choice("B.\nAnswer: 2")]}
        with fake.serving() as server:
            server.plan = [lambda handler, seen: handler.send_json(some)]
            result = run(capsys, command(one, server.url))
        assert result["samples"] == 5 and result["faults"] == {"null content": 1} and result["failures"] == {}
        assert [seen.body["n"] for seen in server.seen] == [5, 3]

    def test_gzip_is_read_and_a_bomb_is_not(
        self, one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(endpoint, "MAX_REPLY_BYTES", 100_000)
        with fake.serving(fake.gzipped) as server:
            server.plan = [fake.gzip_bomb(30_000_000), fake.raw(b" " * 200_000)]
            result = run(capsys, command(one, server.url, "--num-samples", "1"))
        assert (
            result["failures"] == {"bad reply: too large": 2}
            and result["samples"] == 1
            and result["unreadable_answers"] == 0
        )

    def test_inflating_stops_at_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import asyncio
        import gzip

        async def body() -> Any:
            yield gzip.compress(b"a" * 5_000_000)

        response = httpx.Response(200, headers={"content-encoding": "gzip"}, content=body())
        grown = []
        real = endpoint.zlib.decompressobj

        class Watched:
            def __init__(self, bits: int):
                self.inner = real(bits)

            def decompress(self, block: bytes, most: int) -> bytes:
                grown.append(self.inner.decompress(block, most))
                return grown[-1]

        monkeypatch.setattr(endpoint.zlib, "decompressobj", Watched)
        with pytest.raises(endpoint.Failed, match="too large"):
            asyncio.run(endpoint._read(response, 1000))
        assert max(map(len, grown)) <= 1001

    @pytest.mark.parametrize("trouble", [fake.hang, fake.slow_body, fake.slow_headers])
    def test_a_request_ends_at_its_timeout_however_slowly_it_drips(
        self, one: Path, trouble: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with fake.serving() as server:
            server.plan = [trouble]
            begun = time.monotonic()
            result = run(capsys, command(one, server.url, "--timeout", "1"))
            assert time.monotonic() - begun < 25
        assert result["samples"] == 5 and set(result["failures"]) == {"timeout"}
        assert 0.9 < ledger(one, "failure")[0]["seconds"] < 25

    def test_retries_end_at_the_deadline(self, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def answer(handler: fake.Handler, seen: fake.Seen) -> None:
            (fake.status(500) if "What is 0" in seen.prompt else fake.samples())(handler, seen)

        with fake.serving(answer) as server:
            begun = time.monotonic()
            result = run(capsys, command(two, server.url, "--deadline", "2"))
            assert time.monotonic() - begun < 60
            assert (result["samples"], result["missing"], result["complete"]) == (5, 5, 1)
            assert result["failures"]["500"] > 1 and "'q0' was given up: 500" in result["log"]
            assert len(server.seen) == result["requests"]
            server.usual = fake.samples()
            assert run(capsys, command(two, server.url))["missing"] == 0

    @pytest.mark.parametrize("form", ["seconds", "date"])
    def test_retry_after_is_honoured_by_all(self, two: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
        def busy(handler: fake.Handler, seen: fake.Seen) -> None:
            # dates lose a fraction
            wait = {"seconds": "1", "date": email.utils.formatdate(time.time() + 2, usegmt=True)}[form]
            fake.status(429, retry_after=wait)(handler, seen)

        with fake.serving() as server:
            server.plan = [busy]
            result = run(capsys, command(two, server.url, "--concurrency", "1"))
        assert result["failures"] == {"429": 1} and result["samples"] == 10
        assert server.seen[1].time - server.seen[0].time >= 0.95

    def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
        self, one: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with fake.serving(fake.status(429, retry_after="86400")) as server:
            begun = time.monotonic()
            assert "no sample came" in run(capsys, command(one, server.url), 1)["log"]
            assert time.monotonic() - begun < 60 and len(server.seen) == 1

    @pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "Thu, 99 Foo 2020"])
    def test_a_nonsensical_retry_after_is_no_wait(
        self, one: Path, value: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with fake.serving() as server:
            server.plan = [fake.status(503, retry_after=value)]
            assert run(capsys, command(one, server.url))["samples"] == 5
            assert server.seen[1].time - server.seen[0].time < 10

    @pytest.mark.parametrize(("code", "advice"), [(401, "set OPENAI_API_KEY"), (403, "may"), (404, "--teacher-model")])
    def test_no_request_will_do_better(
        self, one: Path, code: int, advice: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        questions = write_questions(one, 40)
        with fake.serving(fake.status(code, "go away")) as server:
            result = run(capsys, command(questions, server.url, "--concurrency", "4"), 1)
        assert (
            len(server.seen) <= 4
            and f"says {code}: " in result["log"]
            and "go away" in result["log"]
            and advice in result["log"]
        )

    @pytest.mark.parametrize("code", [400, 413, 422])
    def test_a_refused_question_is_not_asked_again_and_the_others_are(
        self, two: Path, code: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with fake.serving() as server:
            server.plan = [fake.status(code, "the prompt is too long")]
            result = run(capsys, command(two, server.url, "--concurrency", "1"))
        assert len(server.seen) == 2 and result["samples"] == 5 and result["failures"] == {str(code): 1}
        assert "5 samples are missing" in result["log"]

    def test_bad_replies_without_end_are_given_up(self, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with fake.serving(fake.raw(b"<html>")) as server:
            assert "no sample came; the last reason: bad reply: HTML" in run(capsys, command(two, server.url), 1)["log"]
        assert len(server.seen) == 2 * endpoint.BAD_REPLIES

    def test_a_teacher_that_fails_all_along_is_left_alone(self, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
        questions = write_questions(one, 30)
        with fake.serving(fake.status(400)) as server:
            args = command(questions, server.url, "--max-failures", "3", "--concurrency", "1")
            assert "3 questions in a row failed" in run(capsys, args, 1)["log"]
        assert len(server.seen) == 3

    def test_failures_with_successes_between_them_stop_nothing(
        self, one: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        questions = write_questions(one, 6)
        with fake.serving() as server:
            server.plan = [fake.status(400), fake.samples()] * 3
            result = run(capsys, command(questions, server.url, "--max-failures", "2", "--concurrency", "1"))
        assert len(server.seen) == 6 and (result["complete"], result["missing"]) == (3, 15)

    def test_nobody_listens(self, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = run(capsys, command(one, "http://127.0.0.1:9/v1", "--deadline", "0.3"), 1)
        assert set(result["failures"]) == {"no connection"} and result["estimated_replies"] == 0

    @pytest.mark.parametrize("code", [301, 302, 307, 308])
    def test_redirects_are_not_followed(
        self, one: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with fake.serving() as thief, fake.serving() as server:
            server.usual = fake.raw(
                b"", code, location=thief.url.replace("127.0.0.1", "localhost") + "/chat/completions"
            )
            result = run(capsys, command(one, server.url), 1)
            assert thief.seen == [] and len(server.seen) == 1
        assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
        assert result["failures"] == {"redirect": 1} and "localhost, not followed" in result["log"]

    def test_loopback_goes_through_no_proxy(
        self, one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with fake.serving() as proxy, fake.serving() as server:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
            assert run(capsys, command(one, server.url))["samples"] == 5
            assert proxy.seen == [] and len(server.seen) == 1

    @pytest.mark.parametrize(
        ("url", "base"),
        [
            ("https://a.example", "https://a.example/v1"),
            ("https://a.example/v1/", "https://a.example/v1"),
            ("https://a.example/openai/v1/chat/completions", "https://a.example/openai/v1"),
            ("http://[::1]:8000/v1/completions", "http://[::1]:8000/v1"),
            ("https://user:pass@a.example/v1", None),
            ("https://a.example/v1?key=1", None),
            ("https:///v1", None),
            ("http://a.example:port/v1", None),
        ],
    )
    def test_addresses(self, url: str, base: str | None) -> None:
        if base is None:
            with pytest.raises(InputError, match="--teacher"):
                base_url(url)
        else:
            assert base_url(url) == base

    @pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": 3}, {"prompt_tokens": -1, "completion_tokens": 2},
                                       {"prompt_tokens": True, "completion_tokens": 2},
                                       {"prompt_tokens": 1e400, "completion_tokens": 2}])  # fmt: skip
    def test_usage_that_is_none_is_estimated(self, usage: Any) -> None:
        reply = parse_reply({"choices": [fake.choice("abcdefgh")], "usage": usage}, "p" * 40)
        assert (reply.estimated, reply.prompt_tokens, reply.completion_tokens) == (True, 10, 2)

    def test_json_stays_alone_on_stdout(self, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with fake.serving() as server:
            assert entry([*command(one, server.url), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["samples"] == 5

    def test_content_in_parts_is_read(self, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Some servers answer with a list of parts, of which the text counts; a list without text is empty content."""
        parts = [{"type": "thinking"}, {"type": "text", "text": "Because.\n"}, {"type": "text", "text": "Answer: 4"}]
        with fake.serving(fake.samples(honours_n=False, texts=lambda seen, i: parts)) as server:
            server.plan = [fake.samples(texts=lambda seen, i: [{"type": "image_url"}, 7])]
            summary = run(capsys, command(one, server.url))
        assert summary["samples"] == 5 and summary["failures"] == {"bad reply: empty content": 1}
        assert {(s["rationale"], s["answer"]) for s in rows(one)[0]["samples"]} == {("Because.", "4")}


class TestTrial20:
    """An intent before each send; nothing finished is asked for again; the cost cap exits 75."""

    def test_killed_again_and_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        questions = write_questions(tmp_path / "questions.jsonl", 24)
        concurrency, kills = 3, 5
        args = command(questions, "URL", "--concurrency", str(concurrency), "--num-samples", "2")
        with fake.serving(fake.samples(honours_n=False, delay_s=0.03)) as server:
            args[args.index("URL")] = server.url
            args += ["--teacher-model", "m"]
            for kill in range(kills):
                process = start(args)
                count = len(server.seen) + 6 + kill
                wait_for(lambda count=count: len(server.seen) >= count)
                process.kill()
                process.communicate()
            result = run(capsys, args)
            time.sleep(0.1)
            intents = {record["request"] for record in ledger(questions, "intent")}
            seen = [request.request for request in server.seen]
            texts = [s["text"] for record in ledger(questions, "reply") for s in record["samples"]]
        assert result["samples"] == 48 and result["complete"] == 24 and len(texts) == len(set(texts)) == 48
        assert len(seen) == len(set(seen)) and set(seen) <= intents and len(intents) - len(seen) <= concurrency * kills
        assert result["lost_in_flight"] <= concurrency * kills and len(seen) - 48 <= concurrency * kills
        assert 0 < result["lost_in_flight"] == len(intents) - 48
        assert sum(len(row["samples"]) for row in rows(questions)) == 48

    def test_the_cost_limit_stops_before_it_is_passed(
        self, questions: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ("--price-input", "0", "--price-output", "10000", "--concurrency", "3")  # a request: 100 tokens, cost 1
        with fake.serving(fake.samples(delay_s=0.6)) as server:
            result = run(capsys, command(questions, server.url, *args, "--max-cost", "3.5"), 75)
            assert result["cost"] == 3 and len(server.seen) == 3 and result["samples"] == 15
            assert "--max-cost 3.5: 3 is spent" in result["stopped"] and result["stopped"] in result["log"]
            assert len(rows(questions)) == 3 and server.seen[2].time - server.seen[1].time < 0.5  # side by side
            assert run(capsys, command(questions, server.url, *args, "--max-cost", "3.5"), 75)["requests"] == 3
            assert run(capsys, command(questions, server.url, *args, "--max-cost", "6"))["cost"] == 6
        assert len(server.seen) == 6

    def test_no_crowd_sets_out_before_a_price_is_known(
        self, questions: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A teacher may think up to --max-tokens: what has not come yet is reckoned as that long, not as a short
        reply."""

        def think(handler: fake.Handler, seen: fake.Seen) -> None:
            usage = {"prompt_tokens": 10, "completion_tokens": 8000}
            # the first alone says how long they are
            handler.server.released.wait(0.2 if "What is 0" in seen.prompt else 0.8)
            handler.send_json({"choices": [fake.choice("Long.\nAnswer: 1")], "usage": usage})

        # a request: 0.8
        args = ("--price-input", "0", "--price-output", "100", "--max-tokens", "8192", "--num-samples", "1")
        with fake.serving(think) as server:
            result = run(capsys, command(questions, server.url, *args, "--max-cost", "1.7"), 75)
        assert result["cost"] == pytest.approx(1.6) and len(server.seen) == 2

    def test_long_replies_among_short_ones_do_not_pass_the_limit(
        self, questions: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By the mean, 313 tokens, the fourth request would be begun."""

        def mixed(handler: fake.Handler, seen: fake.Seen) -> None:
            tokens = 20 if len(handler.server.seen) < 3 else 900
            usage = {"prompt_tokens": 10, "completion_tokens": tokens}
            handler.send_json({"choices": [fake.choice("Long.\nAnswer: 1")], "usage": usage})

        args = ("--price-output", "1000", "--max-tokens", "1000", "--num-samples", "1", "--concurrency", "1")
        with fake.serving(mixed) as server:
            result = run(capsys, command(questions, server.url, *args, "--max-cost", "1.3"), 75)
            assert (result["cost"], len(server.seen)) == (0.94, 3)
            assert run(capsys, command(questions, server.url, *args, "--max-cost", "1.3"), 75)["requests"] == 3


class TestTrial21:
    """Secrets in environment, configuration and error bodies come out nowhere."""

    def test_the_key_comes_out_nowhere(self, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Servers that say the key back in errors, headers, models and samples; tracebacks; a config file that holds
        it."""

        def echo(handler: fake.Handler, seen: fake.Seen) -> None:
            key = seen.headers["authorization"]
            if "What is 0" in seen.prompt:
                handler.send(500, f"{'x' * 280} you said {key} {key}".encode())
            else:
                handler.send_json({"choices": [fake.choice(f"You said {key}.\nAnswer: 1")], "model": key})

        said, output = "", two.with_name("samples.jsonl")
        with fake.serving(echo) as server:
            server.plan = [fake.raw(b"", 302, location=f"http://{KEY}.example/")]
            for more in ((), ("--deadline", "0.3"), ("--dry-run",)):
                process = start(command(two, server.url, "--deadline", "2", *more), OPENAI_API_KEY=KEY)
                out, err = process.communicate(timeout=100)
                said += out + err
            server.usual = fake.status(401, f"bad key {KEY}")
            process = start(command(two, server.url), OPENAI_API_KEY=KEY)
            said += "".join(process.communicate(timeout=100))
            assert "says 401" in said
            config = tmp_path / "config.yaml"
            config.write_text(f"api_key: {KEY}\n")
            process = start(command(two, server.url, "--config", str(config)), OPENAI_API_KEY=KEY)
            said += "".join(process.communicate(timeout=100))
            assert "unknown option 'api_key'" in said
        assert any(KEY in seen.headers["authorization"] for seen in server.seen)
        written = output.read_text() + output.with_name("samples.jsonl.ledger.jsonl").read_text()
        assert "You said Bearer ***." in written and "failure" in written
        assert KEY not in said + written and KEY[:16] not in said + written

    def test_an_unexpected_error_does_not_print_the_key(
        self, one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)

        async def broken(self: Endpoint, *args: Any) -> Any:
            raise LookupError(f"headers {dict(self._client.headers) if self._client else ''} {KEY}")

        monkeypatch.setattr(Endpoint, "_exchange", broken)
        assert entry(command(one, "http://127.0.0.1:9/v1")) == 1
        out, err = capsys.readouterr()
        assert "LookupError" in err and "Traceback" in err and KEY not in out + err

    def test_the_key_stays_on_encrypted_ways(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(InputError, match=r"would go to teacher\.example unencrypted") as caught:
            Endpoint(EndpointSettings("http://teacher.example/v1"))
        assert KEY not in str(caught.value)
        Endpoint(EndpointSettings("http://teacher.example/v1", allow_plain_http=True))
        for url in ("https://teacher.example/v1", "http://127.0.0.1:1/v1", "http://localhost:1", "http://[::1]:1/v1"):
            Endpoint(EndpointSettings(url))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-line\nbreak")
        with pytest.raises(InputError, match="no HTTP header"):
            Endpoint(EndpointSettings("https://teacher.example/v1"))

    def test_training_writes_no_secret_of_the_environment(
        self, rows_file: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """Not into the log, the resolved config, the metrics or a checkpoint; not from a message, not from a
        traceback."""
        from qcrd_fast.train.objective import Objective

        secrets = {"HF_TOKEN": "hf_" + "a" * 30, "WANDB_API_KEY": "swordfish-1234", "OPENAI_API_KEY": KEY}
        for name, value in secrets.items():
            monkeypatch.setenv(name, value)
        real, calls = Objective.step, []

        def leaky(self: Any, *args: Any) -> Any:
            calls.append(1)
            logging.getLogger("qcrd_fast.train.objective").warning("connecting with %s", secrets)
            if len(calls) == 3:
                raise LookupError(f"401 for {secrets}, Authorization: Bearer {KEY}")
            return real(self, *args)

        monkeypatch.setattr(Objective, "step", leaky)
        run_folder = tmp_path / "run"
        args = ["train", "--data", str(rows_file), "--student", str(llama_folder), "--output-dir", str(run_folder)]
        assert entry([*args, "--method", "dss", "--max-steps", "4", "--save-steps", "1"]) == 1
        said = "".join(capsys.readouterr())
        assert (
            "LookupError" in said and "Traceback" in said and "connecting with" in (run_folder / "run.log").read_text()
        )
        written = [path for path in run_folder.rglob("*") if path.is_file()]
        assert {"metrics.jsonl", "run.log", "config.resolved.yaml", "state.json"} <= {path.name for path in written}
        for secret in secrets.values():
            assert secret not in said
            assert not [path.name for path in written if secret.encode() in path.read_bytes()]

    def test_a_secret_is_no_option(
        self, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / "config.yaml"
        config.write_text(f"api_key: {KEY}\n", encoding="utf-8")
        assert entry(["train", "--config", str(config), "--output-dir", str(tmp_path / "run")]) == 2
        assert KEY not in "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
        student = f"https://me:{KEY}@hub.example/model"
        rows = write_questions(tmp_path / "rows.jsonl", 4)
        args = [
            "train",
            "--data",
            str(rows),
            "--student",
            student,
            "--method",
            "finetune",
            "--output-dir",
            str(tmp_path / "run"),
        ]
        assert entry(args) == 2
        assert KEY not in "".join(capsys.readouterr())
        assert not [
            path for path in (tmp_path / "run").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
        ]
