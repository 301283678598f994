"""File types: tables, parquet, gzip, `datasets` folders and data sets of the hub, and bounds against hostile ones."""

from __future__ import annotations

import builtins
import functools
import gzip
import http.server
import json
import os
import resource
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from qcrd_fast.data import files, tables
from qcrd_fast.data.load import load_questions, prepare, validate_file
from qcrd_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("question", "answer", "rationale", "prediction")
FLAT = [
    ("A crate holds 6 jars. How many are in 3, all told?", "18", "3 * 6 = 18.", "18"),
    ("A crate holds 6 jars. How many are in 3, all told?", "18", "6, 12; then 18.", "18"),
    ("A crate holds 6 jars. How many are in 3, all told?", "18", 'He said "3 + 6".\nThat is 9.', "9"),
    ("Ida had 9 nuts\tand ate 2. How many are left?", "7", "9 - 2 = 7.", "7"),
]
OWN = [
    {"question": f"{n} + {n}?", "answer": str(2 * n), "samples": [{"rationale": f"{n} twice", "answer": str(2 * n)}]}
    for n in range(5)
]


def table(delimiter: str = ",", names: tuple[str, ...] = COLUMNS, end: str = "\n") -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([names, *FLAT])
    return text.getvalue()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_rows() -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in FLAT]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path)
    return path


FILES = {
    "rows.csv": table().encode(),
    "semicolons.csv": table(";").encode(),
    "tabs.csv": table("\t").encode(),
    "capitals.csv": table(names=("Question", "Answer", "Rationale", "Prediction")).encode(),
    "crlf and bom.csv": b"\xef\xbb\xbf" + table(end="\r\n").encode(),
    "blank lines.csv": b"\n" + table(end="\n\n").encode(),
    "rows.tsv": table("\t").encode(),
    "rows.csv.gz": gzip.compress(table().encode()),
    "ROWS.CSV": table().encode(),
    "rows.jsonl": lines(as_rows()),
    "rows.jsonl.gz": gzip.compress(lines(as_rows())),
    "no suffix": gzip.compress(lines(as_rows())),
    "rows.json": json.dumps(as_rows(), indent=2).encode(),
    "rows.json.gz": gzip.compress(b"\xef\xbb\xbf" + json.dumps(as_rows()).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_file_type(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    result = load_questions(path)
    assert [(q.gold, q.votes) for q in result.questions] == [("18", {"18": 2, "9": 1}), ("7", {"7": 1})]
    assert result.questions[0].negatives[0].text == FLAT[2][2] and result.questions[1].question == FLAT[3][0]
    assert result.summary.inputs[0]["rows"] == 4 and not list(validate_file(path))


def test_column_orders_and_an_index_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        ",prediction,rationale,question,gold,mood\n0,4,two and two,2 + 2?,4,good\n1,5,no idea,2 + 2?,4,\n2,4,it is,2 "
        "+ 2?,4,\n"
    )
    result = load_questions(path)
    assert result.questions[0].votes == {"4": 2, "5": 1} and result.summary.keys_not_read == {"mood": None}


def test_lists_in_cells_are_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,generations,gold\n2 + 2?,"[""Two. The answer is 4."", ""The answer is 5.""]",4\n')
    assert load_questions(path).questions[0].votes == {"4": 1, "5": 1}
    path.write_text(
        'question,choices,answer,samples\nWhich?,"[""oven"", ""train""]",B,"[""I say B."", ""The answer is train.""]"\n'
    )
    assert load_questions(path).questions[0].majority == "train"
    path.write_text('question,generations\n2 + 2?,"[4"\n')
    assert [bad.reason for bad in validate_file(path)] == [
        "generations expects a list; its text is not readable as JSON"
    ]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"question,answer\n1?,1\n2?,2,3\n", 3, "3 cells, but the header has 2"),
        (b'question,answer\n"1\n?",1\n2?\n', 4, "1 cells, but the header has 2"),
        (b"question,question\n1?,1\n", 1, "two columns are named 'question'"),
        (b"question,answer\n1?,1\n2\xe9?,2\n", 3, "not UTF-8: byte 0xe9"),
        (b'question,answer\n1?,1\n"2?,2\n', 3, "not CSV: unexpected end of data"),
        (b'question,answer\n"1"?,1\n', 2, "not CSV: "),
        (b"question,answer\n", 1, "a header line and no rows"),
        (b"", 1, "the file is empty"),
        (b"\n\n", 1, "the file is empty"),
        (b",,\n1,2,3\n", 1, "the header line names no columns"),
        ("question,answer\n1?,1\n".encode("utf-16"), 1, "this is UTF-16 text; save it as UTF-8"),
        (b"query text,answer\n1?,1\n", 2, "missing key 'question'"),
    ],
)
def test_faults_of_a_table_are_named(content: bytes, line: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    bad = list(validate_file(path))
    assert (bad[0].line, len(bad)) == (line, 1) and bad[0].reason.startswith(reason)
    with pytest.raises(InputError, match=rf"rows\.csv:{line}: "):
        load_questions(path)


def test_a_quote_that_is_not_closed_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n1?,1\n"2?,2\n' + "3?,3\n" * 1000)
    (bad,) = validate_file(path)
    assert bad.line == 3 and "a row of more than 1,000 bytes (or a quote that is not closed)" in bad.reason


# Parquet and datasets


def test_parquet(tmp_path: Path) -> None:
    flat = write_parquet(tmp_path / "flat.parquet", as_rows())
    assert [q.votes for q in load_questions(flat).questions] == [{"18": 2, "9": 1}, {"7": 1}]
    own = write_parquet(tmp_path / "own.parquet", OWN)
    (tmp_path / "own.jsonl").write_bytes(lines(OWN))
    assert load_questions(own).questions == load_questions(tmp_path / "own.jsonl").questions
    prepare(own, tmp_path / "out.jsonl")
    prepared = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    again = write_parquet(tmp_path / "prepared.parquet", prepared)  # of each row's votes the others' answers are null
    assert load_questions(again).questions == load_questions(tmp_path / "out.jsonl").questions
    assert [q.majority for q in load_questions(again).questions] == ["0", "2", "4", "6", "8"]


def test_values_of_parquet_are_those_of_json(tmp_path: Path) -> None:
    import datetime
    import decimal

    rows = [
        {
            "question": "1 + 1?",
            "gold": decimal.Decimal("2.00"),
            "response": "It is 2.",
            "when": datetime.date(2026, 1, 1),
            "task": None,
        },
        {"question": "2 + 2?", "gold": decimal.Decimal("4.00"), "response": None, "when": None, "task": None},
    ]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    result = load_questions(path)
    assert [q.gold for q in result.questions] == ["2.00", "4.00"] and result.summary.with_samples == 1
    assert result.summary.warnings[0].endswith("1 of 2 rows have no sample; their questions count")
    rows = [
        {"question": "1?", "gold": 2.0},
        {"question": "2?", "gold": float("nan")},
        {"question": b"\xff", "gold": 1.0},
    ]
    path = write_parquet(tmp_path / "nan.parquet", rows[:2])
    assert [q.gold for q in load_questions(path).questions] == ["2.0", None]


def test_faults_of_parquet_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "rows.parquet", OWN)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:40] + b"\0" * 200 + whole[240:], b"PAR1"):
        path.write_bytes(content)
        bad = list(validate_file(path))
        assert bad and "not readable as parquet" in bad[-1].reason and bad[-1].reason.isprintable()
    assert "parquet file inside a gzip" in _only(tmp_path / "x.gz", gzip.compress(whole))
    write_parquet(path, [{"question": "x" * 5000, "answer": "1"}, {"question": "2?", "answer": "2"}])
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    (bad,) = validate_file(path)
    assert bad.line == 1 and "a row of 5,0" in bad.reason
    write_parquet(path, [{"question": "1?"}])
    monkeypatch.setattr(tables, "free_bytes", lambda: 10)
    assert "write smaller row groups" in next(iter(validate_file(path))).reason


def _only(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    (bad,) = validate_file(path)
    return bad.reason


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    train, test = datasets.Dataset.from_list(OWN), datasets.Dataset.from_list(OWN[:2])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict(dev=test, eval=test).save_to_disk(tmp_path / "odd")
    return tmp_path


def test_datasets_folders(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(load_questions(saved / "one").questions) == len(load_questions(saved / "dict").questions) == 5
    assert len(load_questions(saved / "dict", split="test").questions) == 2
    assert len(load_questions(saved / "dict", part="test").questions) == 2
    assert len(load_questions(saved / "odd", part="validation").questions) == 2  # dev is one
    assert len(load_questions(saved / "dict" / "test").questions) == 2
    assert entry(["prepare", str(saved / "dict"), "-o", str(saved / "out.jsonl")]) == 0
    assert "`datasets` folder, split train (not read: test)" in capsys.readouterr().out.splitlines()[0]
    with pytest.raises(InputError, match=r"no split 'train' \(there: dev, eval\); --split NAME picks one"):
        load_questions(saved / "odd")
    with pytest.raises(InputError, match="no split 'valid'"):
        load_questions(saved / "dict", split="valid")
    with pytest.raises(InputError, match="a folder is read with --format dss"):
        load_questions(saved, format="native")
    with pytest.raises(InputError, match="--config-name is for data sets of the hub"):
        load_questions(saved / "out.jsonl", config_name="main")
    next((saved / "one").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(InputError, match="not readable as a `datasets` folder"):
        load_questions(saved / "one")


def test_without_the_libraries_the_error_says_how_to_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1....")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "state.json").write_text("{}")
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(tables.importlib, "import_module", missing)
    for name, package in (("x.parquet", "pyarrow"), ("ds", "datasets"), ("someone/data-set", "datasets")):
        where = tmp_path / name if "/" not in name else name
        with pytest.raises(InputError, match=rf"needs {package}, .*pip install 'qcrd-fast\[datasets\]'"):
            load_questions(where)


def test_reading_imports_neither_torch_nor_numpy_nor_pyarrow() -> None:
    code = (
        "import sys, qcrd_fast.data.load, qcrd_fast.data.scan; "
        "bad = {'torch', 'numpy', 'pyarrow', 'datasets'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The hub


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as `datasets` asks for, of one data set, `someone/sums`."""

    content: bytes = b""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        sha = "a" * 40
        if path.startswith("/api/datasets/someone/sums/paths-info") or path.startswith(
            "/api/datasets/someone/sums/tree"
        ):
            entries = [{"type": "file", "path": "train.jsonl", "size": len(self.content), "oid": "b" * 40}]
            self._json(entries if path.rstrip("/").endswith((sha, "main")) else [])
        elif path.startswith("/api/datasets/someone/sums"):
            names = [{"rfilename": "train.jsonl"}]
            self._json(
                {
                    "id": "someone/sums",
                    "sha": sha,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "tags": [],
                    "siblings": names,
                    "downloads": 0,
                    "likes": 0,
                }
            )
        elif path.endswith("/train.jsonl"):
            self._send(
                200, self.content, "application/octet-stream", {"ETag": '"' + "b" * 40 + '"', "X-Repo-Commit": sha}
            )
        else:
            self._send(
                404, b"{}", "application/json", {"X-Error-Code": "EntryNotFound" if "sums" in path else "RepoNotFound"}
            )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        entries = [{"type": "file", "path": "train.jsonl", "size": len(self.content), "oid": "b" * 40}]
        self._json(entries if "paths-info" in self.path else [])

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub on the loopback that has `someone/sums`."""
    _Hub.content = lines(OWN)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _prepare(folder: Path, endpoint: str, *args: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from cli.main import entry; sys.exit(entry(sys.argv[1:]))"
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in offline and not k.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", code, "prepare", *args, "-o", "out.jsonl"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_data_set_of_the_hub(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    done = _prepare(tmp_path, hub, "someone/sums")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("took someone/sums for data set of the hub, split train, native")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5
    done = _prepare(tmp_path, hub, "someone/sums", "--split", "test")
    assert done.returncode == 2 and "no split 'test' (there: train)" in done.stderr
    done = _prepare(tmp_path, hub, "someone/else")
    assert done.returncode == 2 and "someone/else: no such file here, and not readable from the hub: " in done.stderr
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "sums").write_bytes(lines(OWN[:2]))  # a path comes first
    done = _prepare(tmp_path, hub, "someone/sums")
    assert (
        done.returncode == 0
        and done.stdout.startswith("took someone/sums for JSONL")
        and "questions:                             2" in done.stdout
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "data/rows.jsonl", "rows", "/data/rows", "a/b/c", "data/rows.csv.gz"])
def test_what_is_no_name_of_the_hub_is_a_file_that_is_not_there(name: str) -> None:
    assert not files.is_hub_name(name)
    with pytest.raises(InputError, match="No such file"):
        load_questions(name)


# gzip


def bomb(path: Path, line: bytes, count: int) -> Path:
    """A gzip file that expands to `count` times a mebibyte of lines."""
    block = line * (1024 * 1024 // len(line))
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with open(path, "wb") as file:
        for _ in range(count):
            file.write(packer.compress(block))
        file.write(packer.flush())
    return path


@pytest.mark.parametrize(
    "line",
    [b" ", b"\n", json.dumps(OWN[0] | {"question": "How many? " * 400}).encode() + b"\n"],
    ids=["one line", "blank lines", "rows"],
)
def test_a_bomb_is_not_read_on(line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FREE_BYTES", 1 << 18)
    monkeypatch.setattr(files, "MAX_RATIO", 10)
    path = bomb(tmp_path / "rows.jsonl.gz", line, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bad = list(validate_file(path))
    assert "the gzip file expands to more than" in bad[-1].reason and bad[-1].reason.endswith("not read on")
    with pytest.raises(InputError, match="the gzip file expands to more than"):
        prepare(path, tmp_path / "out.jsonl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl.gz"]


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    content = gzip.compress(lines(OWN))
    for spoilt in (content[:-12], content[:30] + b"\0\0\0\0" + content[34:]):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(spoilt)
        bad = list(validate_file(path))
        assert "the gzip file is cut or damaged" in bad[-1].reason or "not JSON" in bad[0].reason
        with pytest.raises(InputError):
            load_questions(path)


def test_a_gzip_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcrd_fast.utils import memory

    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines(OWN)))
    monkeypatch.setattr(memory, "free_bytes", functools.partial(int, 10))
    with pytest.raises(InputError, match="GB are free"):
        load_questions(path)


@pytest.mark.parametrize("key", ["response", "generations", "explanation", "predicted_answer"])
def test_an_empty_first_cell_does_not_hide_a_column(key: str, tmp_path: Path) -> None:
    def cell(text: str) -> str | list[str]:
        return (
            [f"So {text}. Answer: {text}"]
            if key == "generations"
            else text
            if "answer" in key
            else f"So. Answer: {text}"
        )

    rows = [{"question": "5 + 5?", "answer": "10", key: cell("10")}]
    rows += [{"question": "1 + 1?", "answer": "2", key: cell(text)} for text in ("2", "3")]
    rows[0][key] = ""
    if key != "generations":
        path = tmp_path / "rows.csv"
        path.write_text("\n".join(",".join(map(str, line)) for line in [rows[0], *map(dict.values, rows)]))
        assert load_questions(path).summary.samples == 2
    rows[0][key] = None  # type: ignore[assignment]
    result = load_questions(write_parquet(tmp_path / "rows.parquet", rows))
    assert (len(result.questions), result.summary.samples) == (2, 2)
    assert "1 of 3 rows have no sample" in result.summary.warnings[0]


def test_a_sample_far_below_rows_without_is_not_lost(tmp_path: Path) -> None:
    rows = [f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}' for i in range(70)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, '{"question": "1 + 1?", "answer": "2", "response": "It is 2."}']))
    with pytest.raises(
        InputError, match=r"rows\.jsonl:71: 'response' looks like a sample, but the file was taken for 'native'"
    ):
        load_questions(path)
    assert load_questions(path, mapping="completion=response").summary.samples == 1


def test_rows_of_empty_cells_are_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer,response\n1 + 1?,2,It is 2.\n,,\n1 + 1?,2,It is 3.\n" ",,\n')
    result = load_questions(path)
    assert result.summary.samples == 2 and result.summary.inputs[0]["blank_lines"] == 2


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("a.json", '{ "data": [\n{"question": "1?"}\n]}', r"jq -c '\.data\[\]' FILE"),
        ("a.json", '{\n "rows": [\n  {"question": "1?"}\n]}', r"jq -c '\.rows\[\]' FILE"),
        ("a.json", '{"data": [{"question": "1?"}]}', r"jq -c '\.data\[\]' FILE"),
        ("a.jsonl", '{\n  "question": "1?"\n}\n', r"pretty-printed.*jq -c \. FILE"),
        ("a.jsonl", '[\n  {\n  "question": "1?"\n}\n]\n', "a JSON array over several lines"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_inside_another_layout_are_told(name: str, text: str, hint: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(InputError, match=hint):
        load_questions(path)


def test_a_split_that_cannot_hold_is_refused(tmp_path: Path) -> None:
    path, plain = tmp_path / "rows.jsonl", tmp_path / "plain.jsonl"
    path.write_text(
        '{"question": "1 + 1?", "gold": "2", "split": "train"}\n{"question": "2?", "gold": "2", "split": "test"}'
    )
    plain.write_text('{"question": "1 + 1?", "gold": "2"}')
    prepare(path, tmp_path / "out.jsonl", split="test")
    with pytest.raises(InputError, match=r"no questions of --split trian \(there: train, test\)"):
        prepare(path, tmp_path / "out.jsonl", split="trian")
    with pytest.raises(InputError, match="no questions of --split test: neither a file nor a row has a split"):
        prepare(plain, tmp_path / "out.jsonl", split="test")


def test_a_split_of_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"question": "1 + 1?", "gold": "2"}])})
    saved.save_to_disk(tmp_path / "saved")
    saved["train"].save_to_disk(tmp_path / "alone")
    prepare(tmp_path / "saved" / "train", tmp_path / "out.jsonl", split="train")
    for path in (tmp_path / "saved" / "train", tmp_path / "alone"):
        with pytest.raises(InputError, match="--split test"):
            prepare(path, tmp_path / "out.jsonl", split="test")


def test_a_folder_that_is_no_data_set_asks_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="name the file"):
        load_questions(tmp_path / "folder")


def test_without_the_network_a_hub_name_fails_at_once(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    begun = time.monotonic()
    done = _prepare(tmp_path, "https://nowhere.invalid", "someone/sums")
    assert done.returncode == 2 and "someone/sums: no such file here" in done.stderr and "etry" not in done.stderr
    assert time.monotonic() - begun < 60
