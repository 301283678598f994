"""Whatever bytes, texts and JSON come in: refused by name or read, never an exception, and never slowly.

`QCRD_FAST_FUZZ=20000 pytest tests/reliability/test_fuzz.py` tries so many examples of each, other ones at each run;
without it the same few hundred are tried every time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcrd_fast.collect.ledger import Ledger
from qcrd_fast.collect.prompts import read_reply
from qcrd_fast.collect.reply import parse_reply
from qcrd_fast.config import TASKS, TrainConfig
from qcrd_fast.data import schema
from qcrd_fast.data.answers import canonical, guess_task, parse_choices, same_answer, surface
from qcrd_fast.data.expressions import evaluate_expression
from qcrd_fast.data.files import open_rows
from qcrd_fast.data.load import load_questions, prepare, validate_file
from qcrd_fast.data.replies import extract_answer, is_correct
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.report import run_view
from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import MANIFEST, STATE
from qcrd_fast.train.negative_store import NegativeStore, digest
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.utils.files import sha256, write_json

LONG = int(os.environ.get("QCRD_FAST_FUZZ", "0"))
SLOW_S = 20.0  # of the processor: what hangs takes forever, and machines are slow
FUZZ = settings(
    max_examples=LONG or 150,
    derandomize=not LONG,
    database=None,
    deadline=None,  # `quickly` has one that a busy machine keeps
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    begun = time.process_time()
    yield
    assert time.process_time() - begun < SLOW_S


# What comes in

ODD = "0123456789.,+-*/()=%$^ eExXaAbB:#\n\t\r\0\\\"'{}[]½²−３٣\u200d\u200f\u202eé\u0301ß€\ud800\U0001f600\u2028"
WORDS = (
    "answer is ",
    "Answer:",
    "####",
    "\\boxed{",
    "(a)",
    "yes",
    "no",
    "The answer is",
    "\n\nQ:",
    "1,000",
    "9**9",
    "1e9",
    "<think>",
)
texts = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(ODD), max_size=60),
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(st.sampled_from(ODD), max_size=8)), max_size=12).map("".join),
    st.builds(lambda text, n: text * n, st.text(st.sampled_from(ODD), min_size=1, max_size=12), st.integers(2, 3000)),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
SAMPLES: list[Any] = [
    {"rationale": "two and two", "answer": "4", "source": "me"},
    {"rationale": "no", "answer": 5},
    "So 4.",
]
ROWS: list[dict[str, Any]] = [
    {"id": "q", "question": "2 + 2?", "answer": "4", "samples": SAMPLES},
    {"id": 7, "question": "2 + 2?", "context": "c", "gold": 4, "majority": "4", "votes": {"4": 2}, "task": "number",
     "positives": [{"text": "four", "answer": "4", "score": 0.5}, "it is"],
     "negatives": [{"text": "no", "answer": "5"}]},
    {"question": "Where?", "choices": ["park", "zoo"], "answer": "zoo", "domain": "d", "split": "train"},
    {"input": "2 + 2?", "chain": "two", "completion": "4", "answer": "4", "initial_correct": True},
    {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Two and two: 4."}],
    "gold": 4},
    {"instruction": "Add.", "input": "2 + 2", "output": "So it is 4."},
    {"problem": "2 + 2?", "solution": "Well. \\boxed{4}", "generations": ["It is 4.", {"text": "Or 5.", "answer": 5}]},
    {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": [{"from": "gpt", "value": "It is 5."}]},
    {"question_stem": "Which?", "choices": {"text": ["park", "zoo"], "label": ["A", "B"]}, "answerKey": "B",
    "answers": ["B"]},
]  # fmt: skip
ODD_BYTES = (b"\n", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"[", b"{", b"NaN", b"1e999", b"\\ud800",
    b"\xef\xbb\xbf",
             b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000)  # fmt: skip
KEYS = sorted({key for row in ROWS for key in row} | {"text", "rationale", "source", "score"})


@st.composite
def spoilt(draw: Any, value: Any) -> Any:
    """`value` with a few of its parts replaced, dropped or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(0, 3))):
        inner = value
        while isinstance(inner, dict | list) and inner and draw(st.booleans()):
            key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
            if not isinstance(inner[key], dict | list):
                break
            inner = inner[key]
        if isinstance(inner, dict):
            key = draw(st.one_of(st.sampled_from(KEYS), st.sampled_from(sorted(inner) or [""]), texts))
            if draw(st.booleans()):
                inner.pop(key, None)
            else:
                inner[key] = draw(values)
        else:
            inner.insert(draw(st.integers(0, len(inner))), draw(values))
    return value


@st.composite
def mutated(draw: Any, base: bytes) -> bytes:
    """`base` with a few bytes changed, lost, doubled or put in."""
    data = bytearray(base)
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 9))
        how = draw(st.sampled_from(("flip", "lose", "double", "put")))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "lose":
            del data[at : at + length]
        elif how == "double":
            data[at:at] = data[at : at + length]
        else:
            data[at:at] = draw(st.one_of(st.binary(max_size=9), st.sampled_from(ODD_BYTES)))
    return bytes(data)


def dumped(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


lines = st.lists(st.one_of(*(spoilt(row).map(dumped) for row in ROWS)), max_size=4).map(b"\n".join)
arrays = st.lists(st.one_of(*(spoilt(row) for row in ROWS)), max_size=4).map(lambda found: dumped(found))
files = st.one_of(st.binary(max_size=200), lines, arrays, lines.flatmap(mutated), arrays.flatmap(mutated))


# The row reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@FUZZ
@given(
    content=files, name=st.sampled_from(("rows.jsonl", "rows.json", "x_train.json", "rows.bin", "rows.csv", "rows.tsv"))
)
def test_any_file_is_read_or_its_rows_are_named(folder: Path, content: bytes, name: str) -> None:
    path, output = folder / name, folder / "out.jsonl"
    path.write_bytes(content)
    with quickly():
        bad = list(validate_file(path))
        assert all(row.path == str(path) and row.line >= 1 and row.reason for row in bad)
        assert all("\n" not in str(row) and str(row).isprintable() for row in bad)
        assert open_rows(path) and len({row.line for row in bad}) <= content.count(b"\n") + 1
        with contextlib.suppress(InputError):
            loaded = load_questions(path, on_bad_row="skip")
            prepare(path, output, on_bad_row="skip")
            assert not list(validate_file(output))
            assert load_questions(output).questions == loaded.questions
            assert len(bad) <= loaded.summary.skipped_rows
        with contextlib.suppress(InputError):
            load_questions(path)
            assert not bad


# The answer parser


@FUZZ
@given(text=texts, other=texts, task=st.sampled_from(TASKS), choices=st.lists(texts, max_size=4))
def test_any_text_has_an_answer_or_none(text: str, other: str, task: str, choices: list[str]) -> None:
    with quickly():
        key = canonical(text, task, choices)
        assert key != "" and (surface(text, task, choices) is None) == (key is None)
        if key is not None and task in ("number", "equation", "yes-no"):
            assert canonical(key, task) == key
        answer = extract_answer(text, task, choices)
        if answer is not None:
            assert canonical(answer, task, choices) is not None and is_correct(text, answer, task, choices)
        assert same_answer(text, text, task, choices) == (key is not None)
        assert same_answer(text, other, task, choices) == same_answer(other, text, task, choices)
        guess_task([text, other])
        parse_choices(text)
        evaluate_expression(text)
        question = schema.Question("q", text, task=task)
        read_reply(other, question)
        read_reply(other, question, cut=True)


numbers = st.one_of(
    st.integers(0, 10**9).map(str), st.decimals(0, 999, places=2).map(str), st.sampled_from(("9" * 65, ".5", "1e9"))
)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds(
            lambda a, op, b: f"({a} {op} {b})", inner, st.sampled_from(("+", "-", "*", "/", "**", "^", "x", "")), inner
        ),
        inner.map(lambda a: f"-{a}"),
    ),
    max_leaves=40,
)


@FUZZ
@given(text=expressions)
def test_any_expression_is_bounded(text: str) -> None:
    with quickly():
        value = evaluate_expression(text)
        assert value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) <= 4096
        assert is_correct(text, text, "equation") == (canonical(text, "equation") is not None)


# What a teacher says


@FUZZ
@given(
    value=st.one_of(values, spoilt({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}], "usage": {}}))
)
def test_any_reply_is_read_or_a_counted_fault(value: Any) -> None:
    with quickly():
        reply = parse_reply(value, "prompt")
        assert reply.choices or reply.faults
        assert all(isinstance(choice.text, str) and choice.text.strip() for choice in reply.choices)
        assert reply.prompt_tokens >= 0 and reply.completion_tokens >= 0


LEDGER = [
    {"kind": "start", "model": "m", "pid": 1, "version": 1},
    {"kind": "intent", "request": "r-1", "id": "q", "n": 1, "prompt_tokens": 3, "completion_tokens": 4,
    "estimated": True},
    {"kind": "reply", "request": "r-1", "id": "q", "prompt": "p", "prompt_tokens": 3, "completion_tokens": 4,
     "faults": {"a": 1}, "samples": [{"rationale": "r", "answer": "1", "source": "m"}]},
    {"kind": "failure", "request": "r-2", "reason": "500", "prompt_tokens": 0, "completion_tokens": 0},
]  # fmt: skip


@FUZZ
@given(content=st.one_of(*(spoilt(r).map(dumped) for r in LEDGER)).flatmap(mutated), whole=st.booleans())
def test_any_ledger_is_read_or_refused(folder: Path, content: bytes, whole: bool) -> None:
    path = folder / "x.ledger.jsonl"
    path.write_bytes(b"".join(dumped(r) + b"\n" for r in LEDGER) + content + b"\n" * whole)
    with quickly():
        try:
            with Ledger(path) as ledger:
                assert all(isinstance(s, dict) for found in ledger.samples.values() for s in found)
                assert ledger.totals.prompt_tokens >= 0 and ledger.totals.completion_tokens >= 0
        except InputError as error:
            assert str(path) in str(error)


# The manifest reader


@pytest.fixture(scope="module")
def run(rows_file: Path, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qcrd_fast.train.trainer import train

    out = tmp_path_factory.mktemp("run") / "run"
    sizes = dict(max_steps=1, per_device_train_batch_size=4, iteration_steps=1, max_new_tokens=4, max_answer_tokens=4)
    sizes |= dict(negative_source="lagged", max_target_length=24)
    train(
        TrainConfig(data=str(rows_file), student=str(llama_folder), output_dir=str(out), discriminator="none", **sizes)
    )
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json"):  # what is not spoilt need not be long
        (out / "checkpoint-1" / name).write_bytes(b"short")
    reseal(out / "checkpoint-1")
    assert checkpoints.find_corruption(out / "checkpoint-1", out) is None
    return out


def reseal(folder: Path) -> None:
    files = {p.name: sha256(p) for p in folder.iterdir() if p.is_file() and p.name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def spoil(path: Path) -> st.SearchStrategy[bytes]:
    """What a JSON file may have become."""
    original = path.read_bytes()
    return st.one_of(
        mutated(original), spoilt(json.loads(original)).map(dumped), st.binary(max_size=99), values.map(dumped)
    )


@FUZZ
@given(data=st.data())
def test_any_manifest_is_whole_or_a_fault(run: Path, data: st.DataObject) -> None:
    path = run / "checkpoint-1" / MANIFEST
    original = path.read_bytes()
    content = data.draw(spoil(path))
    path.write_bytes(content)
    try:
        with quickly():
            fault = checkpoints.find_corruption(path.parent, run)
        with contextlib.suppress(ValueError, RecursionError):
            listed = json.loads(content)["files"] if fault is None else {}
            assert listed.items() <= json.loads(original)["files"].items()  # nothing is whole that was not
    finally:
        path.write_bytes(original)


@FUZZ
@given(data=st.data())
def test_any_state_is_read_or_a_fault(run: Path, data: st.DataObject) -> None:
    """Also where somebody made the manifest fit it."""
    path = run / "checkpoint-1" / STATE
    original, manifest = path.read_bytes(), (path.parent / MANIFEST).read_bytes()
    path.write_bytes(data.draw(spoil(path)))
    reseal(path.parent)
    try:
        with quickly():
            fault = checkpoints.find_corruption(path.parent, run)
        if fault is None:
            state = checkpoints.read_state(path.parent)
            assert type(state["step"]) is int and PromptSettings(**state["prompt"])
    finally:
        path.write_bytes(original)
        (path.parent / MANIFEST).write_bytes(manifest)


# The store of negatives, and what a report reads


def store_in(folder: Path) -> NegativeStore:
    """The store of 8 questions in chunks of 4."""
    config = TrainConfig(per_device_train_batch_size=2, sample_batch_size=4, max_new_tokens=6, max_steps=12)
    return NegativeStore(folder, Schedule(8, config), [f"q{i}" for i in range(8)])


def stored(store: NegativeStore) -> list[dict[str, Any]]:
    """The records of two chunks."""
    records = []
    for chunk in range(2):
        said = [{"chunk": chunk, "id": id, "tokens": [7, 8], "text": id} for id in store.ids(0, chunk)]
        records += [*said, {"chunk": chunk, "end": len(said), "sha256": digest(said)}]
    return records


@FUZZ
@given(data=st.data(), sealed=st.booleans())
def test_any_store_gives_back_what_was_said_or_nothing(folder: Path, data: st.DataObject, sealed: bool) -> None:
    store = store_in(folder / "negatives")
    shutil.rmtree(store.folder, ignore_errors=True)
    store.folder.mkdir()
    records = stored(store)
    original = b"".join(dumped(r) + b"\n" for r in records)
    path = store.path(0)
    if sealed:  # rows of another kind, with a digest that fits them
        rows_ = [data.draw(spoilt(r)) for r in records[:4]]
        with contextlib.suppress(AttributeError):
            records = [*rows_, {"chunk": 0, "end": 4, "sha256": digest(rows_)}]
        path.write_bytes(b"".join(dumped(r) + b"\n" for r in records))
    else:
        path.write_bytes(
            data.draw(st.one_of(mutated(original), spoilt(records[4]).map(dumped), st.binary(max_size=99)))
        )
    with quickly():
        said = store.chunks(0)
    for chunk, found in said.items():
        assert store.ids(0, chunk) == list(found)
        for id, negative in found.items():
            assert isinstance(negative.text, str) and all(type(t) is int and t >= 0 for t in negative.tokens)
            assert sealed or (negative.text, negative.tokens) == (id, [7, 8])
    assert store_in(store.folder).chunks(0) == said  # what was damaged is gone from the file


READERS: dict[str, Callable[[Path], Any]] = {
    "metrics.jsonl": run_view.read_run, "quality_scores.jsonl": run_view.read_run,
    "eval_results.json": run_view.read_run,
    "config.resolved.yaml": run_view.read_run, "predictions.jsonl": run_view.read_run,
}  # fmt: skip


@FUZZ
@given(data=st.data(), name=st.sampled_from(sorted(READERS)))
def test_any_run_can_be_looked_at(run: Path, data: st.DataObject, name: str) -> None:
    path = run / name
    original = (
        path.read_bytes() if path.exists() else b'{"kind": "student", "score": 0.5, "text": "a", "question": "b"}\n'
    )
    content = data.draw(st.one_of(mutated(original), spoilt(LEDGER[0]).map(dumped), st.binary(max_size=99)))
    path.write_bytes(content)
    try:
        with quickly():
            view = READERS[name](run)
            assert view.state and all(isinstance(step["step"], int | float) for step in view.steps)
    finally:
        path.write_bytes(original)
