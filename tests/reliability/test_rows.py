"""Reliability, trials 14 to 18: hostile rows, files larger than the memory, spellings, odd votes, evil expressions."""

from __future__ import annotations

import gzip
import importlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast.config import TASKS, TrainConfig
from qcrd_fast.data.answers import canonical, guess_task, parse_choices
from qcrd_fast.data.expressions import evaluate_expression
from qcrd_fast.data.jsonl import MAX_ROW_BYTES
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.replies import extract_answer, is_correct
from qcrd_fast.errors import InputError
from qcrd_fast.utils import memory
from tests.support.paths import ROOT

MIB = 1 << 20


def row(id: str, **changes: object) -> bytes:
    samples = [{"rationale": f"{n}, I say.", "answer": n} for n in ("4", "5")] + ["Two and two. The answer is 4."]
    return json.dumps({"id": id, "question": f"{id}: 2 + 2?", "answer": "4", "samples": samples} | changes).encode()


def changed(old: bytes, new: bytes) -> bytes:
    assert old in row("bad")
    return row("bad").replace(old, new, 1)


# kind: (what stands on the second line, the reason that is given)
BAD_LINES = {
    "NUL": (changed(b"4, I", b"4\0 I"), "a NUL byte at column"),
    "bad UTF-8": (changed(b"4, I", b"4\xff I"), "not UTF-8: byte 0xff at column"),
    "lone surrogate": (changed(b"4, I", b"4\\ud800 I"), "samples[0]: rationale has a lone surrogate"),
    "duplicate key": (changed(b'{"id"', b'{"id": "twice", "id"'), "duplicate key 'id'"),
    "NaN literal": (changed(b'"answer": "4"', b'"answer": NaN'), "NaN is not JSON"),
    "wrong type": (changed(b'"bad: 2 + 2?"', b"17"), "question expects a string, got a number"),
    "missing key": (changed(b'"question"', b'"query"'), "missing key 'question'"),
    "nested list": (changed(b'[{"rat', b'[[], {"rat'), "samples[0] expects a string or an object"),
    "50 MB line": (b" " * 50_000_000, f"a line of 50,000,001 bytes; at most {MAX_ROW_BYTES:,} are read"),
    "100k-deep nesting": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "one id, two questions": (row("a", question="3 + 3?"), "id 'a' is another question on line 1"),
}
# kind: (the file, the bad line, the reason, the good rows)
BAD_FILES = {
    **{
        kind: (row("a") + b"\n" + line + b"\n" + row("z") + b"\n", 2, why, 2) for kind, (line, why) in BAD_LINES.items()
    },
    "cut last line": (row("a") + b"\n" + row("z")[:70], 2, "the line is cut: ", 1),
    "empty file": (b"", 1, "the file is empty", 0),
    "cut gzip": (gzip.compress(row("a") + b"\n" + row("z") + b"\n")[:-9], 3, "the gzip file is cut or damaged", 2),
    "gzip in gzip": (gzip.compress(gzip.compress(row("a"))), 1, "this is a gzip file inside a gzip file", 0),
}
# kind: a file that is read as if it were plain, and how many rows it has
HARMLESS = {
    "blank lines": (row("a") + b"\n\n  \n" + row("z") + b"\n", 2),
    "CRLF": (row("a") + b"\r\n\r\n" + row("z") + b"\r\n", 2),
    "BOM": (b"\xef\xbb\xbf" + row("a") + b"\n", 1),
    "gzip": (gzip.compress(row("a") + b"\n" + row("z")), 2),
    "BOM, CRLF and gzip": (gzip.compress(b"\xef\xbb\xbf" + row("a") + b"\r\n"), 1),
    "the same row twice": (row("a") + b"\n" + row("a") + b"\n", 1),
}


class TestTrial14:
    """`validate` names file:line: reason and exits 2; `--on-bad-row skip` sets aside and counts."""

    def test_there_are_17_kinds(self) -> None:
        """A byte order mark, CRLF and blank lines were among them; they are what spreadsheets write, and are read."""
        assert len(BAD_FILES) + 3 >= 17

    @pytest.mark.parametrize("kind", BAD_FILES)
    def test_named_refused_or_set_aside(self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content, line, reason, good = BAD_FILES[kind]
        path, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        path.write_bytes(content)
        assert entry(["validate", str(path)]) == 2
        said = capsys.readouterr().out
        assert said.startswith(f"{path}:{line}: {reason}") and said.count("\n") == 1
        prepare = ["prepare", str(path), "--output", str(output), "--json"]
        assert entry(prepare) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"qcrd-fast: {said}" and not output.exists()
        assert entry([*prepare, "--on-bad-row", "skip"]) == (0 if good else 2)
        out, err = capsys.readouterr()
        if not good:
            assert f"no questions; the first of 1 bad rows: {said}" in err and not output.exists()
            return
        assert err.startswith(f"took {path} for ") and err.splitlines()[1:] == [f"set aside {said.rstrip()}"]
        told = json.loads(out)
        assert (told["questions"], told["skipped_rows"]) == (good, 1) and len(output.read_bytes().splitlines()) == good
        assert entry(["validate", str(output)]) == 0

    @pytest.mark.parametrize("kind", HARMLESS)
    def test_harmless_kinds_are_read(self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content, count = HARMLESS[kind]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        assert entry(["validate", str(path)]) == 0
        assert load_questions(path).summary.questions == count

    def test_of_very_many_bad_rows_the_first_are_kept_and_all_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("qcrd_fast.data.load.MAX_SKIPPED", 3)
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"{\n" * 1000 + row("a"))
        args = ["prepare", str(path), "--output", str(tmp_path / "out"), "--on-bad-row", "skip", "--json"]
        assert entry(args) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["skipped_rows"] == 1000 and err.count("set aside ") == 4 and "set aside 997 more" in err


# 1000 is the trial as it is written: a gigabyte, in five minutes
BIG_MB = int(os.environ.get("QCRD_FAST_BIG_MB", "16"))
SCRIPT = """
import resource, sys
from cli.main import entry
code = entry(sys.argv[2:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmPeak"))
open(sys.argv[1], "w").write(str(peak))
sys.exit(code)
"""


def limited(args: list[str], folder: Path, limit: int | None = None) -> tuple[subprocess.CompletedProcess[str], int]:
    """A command in a new process that may take `limit` bytes of address space, and what it took at its peak [bytes]."""

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    peak = folder / "peak"
    command = [sys.executable, "-c", SCRIPT, str(peak), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=set_limit)
    return done, 1024 * int(peak.read_text()) if peak.is_file() else 0


class TestTrial15:
    """A file larger than the memory, a row of a million tokens, the end of memory."""

    @pytest.mark.slow
    def test_a_large_file_in_bounded_memory(self, tmp_path: Path) -> None:
        """2 GiB for a file of 1 GB; for a smaller one, less in proportion beside what Python itself takes."""
        small, big, output = tmp_path / "small.jsonl", tmp_path / "big.jsonl", tmp_path / "out.jsonl"
        small.write_bytes(row("a"))
        _, base = limited(["prepare", str(small), "--output", str(output)], tmp_path)
        limit = 2048 * MIB if BIG_MB >= 1000 else base + 2 * BIG_MB * MIB
        count = size = 0
        with open(big, "wb") as file:
            while size < BIG_MB * 1_000_000:
                said = [
                    {"rationale": f"Ann has {count} and finds {k}. " * 8, "answer": str(count + k)}
                    for k in (1, 1, 1, 2)
                ]
                line = json.dumps(
                    {"id": f"q{count}", "question": f"{count} + 1?", "answer": str(count + 1), "samples": said}
                )
                size += file.write(line.encode() + b"\n")
                count += 1
        done, peak = limited(["validate", str(big)], tmp_path, limit)
        assert done.returncode == 0 and peak <= limit, done.stderr
        done, peak = limited(["prepare", str(big), "--output", str(output), "--json"], tmp_path, limit)
        assert done.returncode == 0 and peak <= limit, done.stderr
        told = json.loads(done.stdout)
        assert (told["questions"], told["negatives"]) == (count, count) and told["duplicates"] == 2 * count
        with open(output, "rb") as file:
            assert sum(1 for _ in file) == count
        assert sorted(p.name for p in tmp_path.iterdir()) == ["big.jsonl", "out.jsonl", "peak", "small.jsonl"]
        print(f"{size:,} bytes, {count:,} rows: {peak / MIB:.0f} MiB at the peak, {base / MIB:.0f} MiB without rows")

    def test_rows_on_the_disk_are_the_rows_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from qcrd_fast.data.load import prepare, write_prepared

        first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        first.write_bytes(row("a", context="c", domain="d") + b"\n" + row("b", task="text") + b"\n")
        prepared = {
            "id": "a",
            "question": "a: 2 + 2?",
            "context": "c",
            "majority": "4",
            "task": "number",
            "votes": {"4": 1},
        }
        sides = {
            "positives": [{"text": "four é\u2028", "answer": "4", "source": "me", "score": 0.25}],
            "negatives": ["no"],
        }
        second.write_text(json.dumps(prepared | sides, ensure_ascii=False) + "\n", encoding="utf-8")
        monkeypatch.setattr("qcrd_fast.data.pooling.SPOOL_BYTES", 100)
        for inputs in ([first], [second], [first, second]):
            loaded = load_questions(inputs)
            summary, _ = prepare(inputs, tmp_path / "one.jsonl")
            write_prepared(tmp_path / "two.jsonl", loaded.questions)
            assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
            assert summary == loaded.summary and load_questions(tmp_path / "one.jsonl").questions == loaded.questions

    def test_a_row_of_a_million_tokens_is_cut_and_named(
        self, t5_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from qcrd_fast.models.prompts import PromptSettings
        from qcrd_fast.models.student import Student
        from qcrd_fast.train.examples import make_examples

        said = [{"rationale": "apples " * 1_000_000, "answer": "4"}, "Two. The answer is 5."]
        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(row("short") + b"\n" + row("endless", samples=said) + b"\n")
        config = TrainConfig(data=str(rows), student=str(t5_folder))
        prompts = PromptSettings("raw", config.max_source_length, config.max_target_length)
        with caplog.at_level(logging.WARNING):
            short, endless = make_examples(
                load_questions(rows).questions, Student.load(str(t5_folder), prompts), config
            )
        (positive,) = endless.positives
        assert len(positive.tokens) == config.max_target_length and len(short.positives[0].tokens) < 20
        (told,) = [r.getMessage() for r in caplog.records if "cut off" in r.getMessage()]
        assert told.startswith("1 of 2 questions have a rationale or label over --max-target-length 256")
        assert "fits all (100% of all their tokens are lost: use it)" in told and told.endswith(": endless")

    def test_a_line_of_50_mb_costs_no_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b" " * 50_000_000 + b"\n" + row("a") + b"\n")
        code = (
            "import re, sys; from qcrd_fast.data.load import validate_file; assert "
            "len(list(validate_file(sys.argv[1]))) == 1;print(re.search(r'VmHWM:\\s+(\\d+)', "
            "open('/proc/self/status').read())[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < 80_000  # KiB at the peak; about 20 before, and one row's bound

    def test_a_row_beyond_the_bound_is_refused(self, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(row("huge", samples=["apples " * (MAX_ROW_BYTES // 7)]) + b"\n")
        with pytest.raises(
            InputError, match=r"rows\.jsonl:1: a line of 16,\d\d\d,\d\d\d bytes; at most 16,777,216 are read"
        ):
            load_questions(rows)

    def test_a_file_that_cannot_fit_is_refused_before_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(row("a"))
        importlib.import_module("qcrd_fast.train.preflight")  # imported now, else it would keep the function below
        monkeypatch.setattr(memory, "free_bytes", lambda: 10)
        assert entry(["train", "--data", str(rows), "--student", "x", "--output-dir", str(tmp_path / "run")]) == 2
        assert "GB are free; take part of its rows, such as: shuf" in capsys.readouterr().err
        assert entry(["prepare", str(rows), "--output", str(tmp_path / "out.jsonl")]) == 0  # does not hold them

    def test_the_end_of_memory_names_what_helps(
        self, t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from qcrd_fast.models.prompts import Prompter

        def full(*_: object) -> list[int]:
            raise MemoryError

        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(row("a") + b"\n" + row("b") + b"\n")
        args = [
            "train",
            "--data",
            str(rows),
            "--student",
            str(t5_folder),
            "--output-dir",
            str(tmp_path / "run"),
            "--dry-run",
        ]
        monkeypatch.setattr(Prompter, "target_ids", full)
        assert entry(args) == 1
        assert "out of memory" in (err := capsys.readouterr().err) and "what helps: --train-fraction" in err
        monkeypatch.setattr("qcrd_fast.data.formats.native.read", full)
        assert entry(args) == 1 and "a part of the rows, such as: shuf" in capsys.readouterr().err
        assert entry(["validate", str(rows)]) == 1 and "out of memory" in capsys.readouterr().err

    def test_what_is_free_is_bounded_by_the_limit_of_the_process(self) -> None:
        assert memory.free_bytes() > 10 * MIB
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
            "from qcrd_fast.utils.oom import free_bytes; assert 0 < free_bytes() < 1 << 30; from pathlib import Path\n"
            "from qcrd_fast.utils.oom import explaining_oom\n"
            "with explaining_oom('--smaller'): bytearray(2 << 30)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "RunError: out of memory" in done.stderr and "what helps: --smaller" in done.stderr


SPELLINGS = {  # of the question, of the right answer, of a wrong one
    "plain": ("Café?", "-32", "25"),
    "NFD": (unicodedata.normalize("NFD", "Café?"), "-32", "25"),
    "signs and digits": (" Café?\n", "\u221232", "\uff12\uff15"),
    "joiners and directions": ("Café?", "\u200f-3\u200d2\u200e", "\u0662\u0665"),
}


class TestTrial16:
    """Unicode forms, scripts, locales and odd names: the same votes, the same bytes."""

    def spelled(self, question: str, right: str, wrong: str) -> dict[str, object]:
        rationales = [{"rationale": f"שלום\u200d {i}", "answer": a} for i, a in enumerate((right, right, wrong))]
        return {"question": question, "answer": "-32", "samples": rationales}

    @pytest.mark.parametrize("spelling", SPELLINGS)
    def test_the_same_votes(self, spelling: str, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps(self.spelled(*SPELLINGS[spelling]), ensure_ascii=False) + "\n", encoding="utf-8")
        (question,) = load_questions(rows).questions
        assert question.votes == {"-32": 2, "25": 1} and question.majority == "-32" and len(question.negatives) == 1
        plain = tmp_path / "plain.jsonl"
        plain.write_text(json.dumps(self.spelled(*SPELLINGS["plain"])) + "\n", encoding="utf-8")
        (both,) = load_questions([plain, rows]).questions  # one question, and the same samples
        assert both.votes == question.votes and both.id == load_questions(plain).questions[0].id

    def test_the_same_bytes_in_any_locale_from_odd_names(self, tmp_path: Path) -> None:
        names = [
            "plain.jsonl",
            "é \u202e שם\n.jsonl",
            unicodedata.normalize("NFD", "é.jsonl"),
            os.fsdecode(b"bytes \xff.jsonl"),
        ]
        text = "".join(json.dumps(self.spelled(*s), ensure_ascii=False) + "\n" for s in SPELLINGS.values())
        code = (
            "import sys; from cli.main import entry; sys.exit(entry(['prepare', sys.argv[1], '--output', sys.argv[2]]))"
        )
        written = set()
        for i, name in enumerate(names):
            (tmp_path / name).write_text(text, encoding="utf-8")
            output = tmp_path / f"{name}.{i}.out"
            plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
            environment = {**os.environ, **(plain if i % 2 else {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"})}
            command = [sys.executable, "-c", code, str(tmp_path / name), str(output)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
            assert done.returncode == 0, done.stderr
            written.add(output.read_bytes())
        assert len(written) == 1 and len(written.pop().splitlines()) == 1

    def test_an_odd_name_is_said_on_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "a\nb\u202e.jsonl"
        path.write_bytes(b"{\n")
        assert entry(["validate", str(path)]) == 2
        assert capsys.readouterr().out.startswith(f"{tmp_path}/a\\nb\\u202e.jsonl:1: ")


def samples(*answers: str | None) -> list[dict[str, str | None]]:
    return [{"rationale": f"Ann has {i} apples.", "answer": answer} for i, answer in enumerate(answers)]


VOTES = {  # the samples of a question; positives, negatives, answers dropped, a tie
    "tie": (samples("1", "2", "1", "2"), 2, 2, 0, True),
    "all distinct": (samples("1", "2", "3", "4", "5"), 1, 4, 0, True),
    "all empty": (samples("", None, " "), 0, 0, 3, False),
    "fewer than K": (samples("1"), 1, 0, 0, False),
    "no samples": ([], 0, 0, 0, False),
    "no negative": (samples("1", "1", "1"), 3, 0, 0, False),
}


class TestTrial17:
    """Ties, all distinct, all empty, fewer than K, no positive, no negative: counted, and a finite loss."""

    @pytest.fixture
    def rows(self, tmp_path: Path) -> Path:
        path = tmp_path / "rows.jsonl"
        rows = [
            {"id": kind, "question": f"{kind} apples?", "answer": "1", "samples": v[0]} for kind, v in VOTES.items()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def test_counts(self, rows: Path) -> None:
        loaded = load_questions(rows, task="number")
        for question in loaded.questions:
            _, positives, negatives, _, tied = VOTES[question.id]
            assert (len(question.positives), len(question.negatives)) == (positives, negatives), question.id
            counts = sorted(question.votes.values())
            assert (question.majority is None) == (not counts) and (
                counts[-2:].count(max(counts, default=0)) == 2
            ) == tied
        told = loaded.summary
        assert (told.questions, told.with_samples, told.ties, told.answers_dropped) == (6, 4, 2, 3)
        assert told.share_without_minority == 0.5

    @pytest.mark.parametrize("student", ["t5_folder", "llama_folder"])
    def test_a_finite_loss(self, student: str, rows: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        from qcrd_fast.train.trainer import train

        only = {
            "id": "no positive",
            "question": "No apples?",
            "gold": "1",
            "majority": None,
            "votes": {},
            "positives": [],
        }
        prepared = tmp_path / "prepared.jsonl"
        assert entry(["prepare", str(rows), "--output", str(prepared), "--task", "number"]) == 0
        with open(prepared, "a", encoding="utf-8") as file:
            file.write(json.dumps(only | {"negatives": [{"text": "Ann has none.", "answer": "0"}]}) + "\n")
        config = TrainConfig(
            data=str(prepared), student=str(request.getfixturevalue(student)), output_dir=str(tmp_path / "run"),
            max_steps=7,
            per_device_train_batch_size=1, iteration_steps=3, max_new_tokens=4, discriminator_pretrain_steps=2,
            discriminator_update_batches=1, discriminator_min_auc=0.0, validation_fraction=0.0, save_steps=100,
            scheme="minmax", negative_source="lagged", quality="discriminator",
        )  # fmt: skip
        train(config)
        logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in logged] == list(range(1, 8))
        assert all(
            abs(record[name]) < 1e4 for record in logged for name in ("loss", "loss_pred", "loss_cl", "grad_norm")
        )

    def test_nothing_to_learn_from_is_refused(self, t5_folder: Path, tmp_path: Path) -> None:
        from qcrd_fast.train.trainer import train

        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(row("a", samples=[]) + b"\n" + row("b", samples=[]) + b"\n")
        with pytest.raises(InputError, match="no question has a positive rationale, which --method qcrd needs"):
            train(TrainConfig(data=str(rows), student=str(t5_folder)), dry_run=True)


class TestTrial18:
    """What would hang or blow up an evaluator is bounded, and wrong."""

    @pytest.mark.parametrize(
        "text",
        [
            "9**9**9**9", "((9**64)**64)**64", "9" * 100_000, "(" * 10_000_000, "1+" * 200_000 + "1", "-" * 500 + "1",
            "*".join(["9" * 60] * 8) + "**64", "1e64**64**64", "(" * 250 + "1" + ")" * 250, "1," * 2000, "1,111" * 2000,
            " ".join("1/2" for _ in range(5000)), "\u0661" * 100_000, "answer is " * 20_000, "(a) " * 20_000,
            "9^" * 200 + "9", "1/" + "0" * 60, "2**-99999999", "(((9**9)**9)**9)!",
        ],
        ids=range(19),
    )  # fmt: skip
    def test_nothing_hangs_and_nothing_is_right(self, text: str) -> None:
        start = time.process_time()  # not of a busy machine
        for task in TASKS:
            canonical(text, task)
            extract_answer(text, task)
            assert not is_correct(text, "7", task)
        evaluate_expression(text)
        guess_task([text])
        parse_choices(text)
        assert time.process_time() - start < 20  # what blows up takes forever

    def test_blow_ups_have_no_value(self) -> None:
        assert evaluate_expression("((9**64)**64)**64") is None
        assert not is_correct("9**9**9**9", "9", "number") and not is_correct("9**9**9**9", "( 9.0 )", "equation")
        assert not is_correct("9**9**9**9", "9**9**9**9", "equation")

    def test_as_samples_they_do_not_vote(self, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        said = samples("9**9**9**9", "(" * 1_000_000, "( 2 + 2 )", "(9**9)**9**9")
        rows.write_bytes(row("a", samples=said, answer="( 2.0 * 2.0 )", task="equation") + b"\n")
        loaded = load_questions(rows)
        assert loaded.questions[0].votes == {"( 2 + 2 )": 1} and loaded.summary.answers_dropped == 3
