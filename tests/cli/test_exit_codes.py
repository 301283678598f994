"""Every exit code of every verb that can end with it, side by side: 0, 1 failed while running, 2 usage, configuration
or data, 75 stopped but resumable, 130 SIGINT, 143 SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import console
from cli.main import cli, entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.runs import checkpoints
from tests.support import fake_teacher as fake
from tests.support.collecting import quick
from tests.support.paths import ROOT

__all__ = ["quick"]
TRAIN = "train --data {rows} --student {student} --output-dir {new} --method dss --max-steps 2 --max-answer-tokens 4"
COLLECT = (
    "collect --questions {rows} --output {new} --teacher {teacher} --teacher-model m --num-samples 1 --deadline 0.3"
)
Spoil = Callable[[pytest.MonkeyPatch], None]


# What goes wrong on the way


def full(patch: pytest.MonkeyPatch) -> None:
    """The disk, once something is to be kept."""

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(os, "fsync", fsync)


def nan(patch: pytest.MonkeyPatch) -> None:
    """The loss."""
    from qcrd_fast.train.objective import Objective

    real = Objective.step

    def step(self: Any, *args: Any) -> Any:
        losses, stats = real(self, *args)
        return losses | {"loss": losses["loss"] * float("nan")}, stats

    patch.setattr(Objective, "step", step)


def broken(patch: pytest.MonkeyPatch) -> None:
    """Something that nobody thought of, where the result is shown."""

    def show(*_: Any) -> None:
        raise LookupError("nobody thought of this")

    patch.setattr(console, "show", show)


def at_the_end(number: signal.Signals) -> Spoil:
    """A signal just before the result is shown."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(console, "show", lambda *_: os.kill(os.getpid(), number))

    return spoil


def while_reading(number: signal.Signals) -> Spoil:
    """A signal while rows are read."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        patch.setattr("qcrd_fast.data.jsonl._parse_line", lambda *_, **__: os.kill(os.getpid(), number))

    return spoil


def in_a_step(number: signal.Signals) -> Spoil:
    """A signal in the midst of a training step, which is finished and saved."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        from qcrd_fast.train.objective import Objective

        real, sent = Objective.step, []

        def step(self: Any, *args: Any) -> Any:
            if not sent:
                sent.append(os.kill(os.getpid(), number))
            return real(self, *args)

        patch.setattr(Objective, "step", step)

    return spoil


def in_flight(number: signal.Signals) -> Spoil:
    """A signal while a request is in flight, whose reply is waited for."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        from qcrd_fast.collect.endpoint import Endpoint

        real, sent = Endpoint._exchange, []

        async def exchange(self: Any, *args: Any) -> Any:
            if not sent:
                sent.append(os.kill(os.getpid(), number))
            return await real(self, *args)

        patch.setattr(Endpoint, "_exchange", exchange)

    return spoil


INT, TERM = signal.SIGINT, signal.SIGTERM
TABLE: list[tuple[int, str, Spoil | None]] = [
    (0, "validate {rows}", None),
    (2, "validate {bad}", None),
    (2, "validate {missing}", None),
    (130, "validate {rows}", while_reading(INT)),
    (143, "validate {rows}", while_reading(TERM)),
    (0, "prepare {rows} --output {new}", None),
    (1, "prepare {rows} --output {new}", full),
    (2, "prepare {bad} --output {new}", None),
    (2, "prepare {rows} --output {readonly}/out.jsonl", None),
    (2, "prepare {rows} --output {run}/predictions.jsonl", None),
    (2, "prepare {rows} --output {run}/checkpoint-1/rows.jsonl", None),
    (130, "prepare {rows} --output {new}", while_reading(INT)),
    (143, "prepare {rows} --output {new}", while_reading(TERM)),
    (0, COLLECT, None),
    (1, COLLECT.replace("{teacher}", "http://127.0.0.1:9/v1"), None),
    (1, COLLECT, full),
    (
        2,
        COLLECT.replace("{teacher}", "{missing}/x").replace("--teacher-model m", "").replace("--deadline 0.3", ""),
        None,
    ),
    (2, COLLECT.replace("{rows}", "{bad}"), None),
    (2, COLLECT + ' --extra-body {{"t":NaN}}', None),
    (75, COLLECT + " --max-requests 3", None),
    (75, COLLECT + " --price-input 0 --price-output 1000 --max-cost 0.05", None),
    (130, COLLECT, in_flight(INT)),
    (143, COLLECT, in_flight(TERM)),
    (0, TRAIN, None),
    (1, TRAIN, nan),
    (1, TRAIN, full),
    (2, TRAIN + " --beta -1", None),
    (2, TRAIN.replace("{rows}", "{bad}"), None),
    (2, TRAIN.replace("{new}", "{run}"), None),
    (2, TRAIN.replace("{new}", "{readonly}/run"), None),
    (130, TRAIN, in_a_step(INT)),
    (143, TRAIN, in_a_step(TERM)),
    (130, TRAIN, while_reading(INT)),
    (143, TRAIN, while_reading(TERM)),
    (0, "demo --output-dir {new} --dry-run", None),
    (2, "demo --output-dir {run}", None),
    (0, "eval {run} --data {rows} --max-answer-tokens 4", None),
    (1, "eval {run} --data {rows} --max-answer-tokens 4", full),
    (2, "eval {run} --data {bad}", None),
    (2, "eval {run} --data {rows} --output {run}", None),
    (2, "eval {run} --data {rows} --output {readonly}", None),
    (2, "eval {run} --data {rows} --output {run}/checkpoint-1", None),
    (0, "eval {run} --data {rows} --dry-run", None),
    (2, "eval {missing}/a/b --data {rows} --dry-run", None),
    (2, "eval {run} --data {rows} --device gpu --dry-run", None),
    (2, "eval {run} --data {unanswered}", None),
    (2, "eval {run} --data {unanswered} --dry-run", None),
    (2, "eval {run} --data {rows} --output {readonly} --dry-run", None),
    (130, "eval {run} --data {rows}", while_reading(INT)),
    (143, "eval {run} --data {rows}", while_reading(TERM)),
    (0, "generate {run} 1+1? --max-new-tokens 4", None),
    (1, "generate {run} 1+1? --max-new-tokens 4", broken),
    (2, "generate {missing}/a/b 1+1?", None),
    (2, "generate {run} 1+1? --temperature nan", None),
    (2, "generate {run} a\udcffb", None),
    (2, "generate " + 300 * "a-question-in-place-of-the-model-" + " {run}", None),
    (130, "generate {run} 1+1? --max-new-tokens 4", at_the_end(INT)),
    (143, "generate {run} 1+1? --max-new-tokens 4", at_the_end(TERM)),
    (0, "score {judged} --data {rows} --output {new}", None),
    (1, "score {judged} --data {rows} --output {new}", full),
    (2, "score {run} --data {rows} --output {new}", None),
    (2, "score {judged} --data {rows} --output {readonly}/scores.jsonl", None),
    (2, "score {judged} --data {rows} --output {judged}/metrics.jsonl", None),
    (2, "score {judged} --data {rows} --train {new} --held-out nan", None),
    (130, "score {judged} --data {rows}", while_reading(INT)),
    (143, "score {judged} --data {rows}", while_reading(TERM)),
    (0, "score-teacher --data {rows} --teacher {student} --top-logprobs 2 --output {new}", None),
    (1, "score-teacher --data {rows} --teacher {student} --top-logprobs 2 --output {new}", full),
    (2, "score-teacher --data {bad} --teacher {student} --top-logprobs 2 --output {new}", None),
    (130, "score-teacher --data {rows} --teacher {student} --output {new}", while_reading(INT)),
    (143, "score-teacher --data {rows} --teacher {student} --output {new}", while_reading(TERM)),
    (0, "select --data {rows} --by random --top 2 --output {new}", None),
    (1, "select --data {rows} --by random --top 2 --output {new}", full),
    (2, "select --data {bad} --by random --top 2 --output {new}", None),
    (130, "select --data {rows} --by random --top 2 --output {new}", while_reading(INT)),
    (143, "select --data {rows} --by random --top 2 --output {new}", while_reading(TERM)),
    (2, "active --pool {rows} --student {student} --output-dir {new}", None),
    (0, "report {run} --output {new}.html", None),
    (1, "report {run} --output {new}.html", full),
    (2, "report {missing} --output {new}.html", None),
    (130, "report {run} --output {new}.html", at_the_end(INT)),
    (143, "report {run} --output {new}.html", at_the_end(TERM)),
    (0, "export {run} --output {new}", None),
    (1, "export {run} --output {new}", full),
    (2, "export {run} --output {run}", None),
    (2, "export {run} --output {new} --checkpoint {judged}/checkpoint-1", None),
    (2, "export {run} --output {readonly}/model", None),
    (130, "export {run} --output {new}", at_the_end(INT)),
    (143, "export {run} --output {new}", at_the_end(TERM)),
    (0, "doctor", None),
    (1, "doctor", broken),
    (2, "doctor --nonsense", None),
    (130, "doctor", at_the_end(INT)),
    (143, "doctor", at_the_end(TERM)),
    (2, "bench nonsense", None),
]


@pytest.fixture(scope="module")
def runs(rows_file: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A finished run without and with a discriminator, and files of all sorts."""
    from qcrd_fast.train.trainer import train

    folder = tmp_path_factory.mktemp("codes")
    sizes = dict(data=str(rows_file), student=str(t5_folder), max_steps=1, max_answer_tokens=4, max_new_tokens=4)
    sizes |= dict(max_target_length=24)
    train(TrainConfig(method="dss", output_dir=str(folder / "run"), **sizes))
    judged = dict(
        quality="discriminator",
        discriminator_pretrain_steps=1,
        discriminator_min_auc=0.0,
        output_dir=str(folder / "judged"),
    )
    train(TrainConfig(**judged, **sizes))
    (folder / "bad.jsonl").write_text('{"question"\n', encoding="utf-8")
    (folder / "unanswered.jsonl").write_text('{"question": "1+1?", "samples": []}\n', encoding="utf-8")
    names = {"run": folder / "run", "judged": folder / "judged", "rows": rows_file, "student": t5_folder}
    # as root no file can be made there either
    names |= {"unanswered": folder / "unanswered.jsonl"}
    names |= {"bad": folder / "bad.jsonl", "missing": folder / "missing", "readonly": Path("/proc/self")}
    return {name: str(path) for name, path in names.items()}


def name_of(case: Any) -> str | None:
    return None if not isinstance(case, str) else case.split()[0]


@pytest.mark.parametrize(
    ("code", "command", "spoil"), TABLE, ids=lambda v: getattr(v, "__qualname__", name_of(v) or str(v))
)
def test_exit_code(
    code: int,
    command: str,
    spoil: Spoil | None,
    runs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    handlers = signal.getsignal(INT), signal.getsignal(TERM)
    with fake.serving() as server, monkeypatch.context() as patch:
        if spoil:
            spoil(patch)
        args = [part.format(**runs, new=tmp_path / "new", teacher=server.url) for part in command.split()]
        assert entry(args) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1] if err.strip() else ""
    if code == 0:
        assert out.strip() or args[0] == "validate"
    elif spoil is broken:
        assert "Traceback" in err and last == "LookupError: nobody thought of this"
    else:
        assert "Traceback" not in err and (last.startswith("qcrd-fast") or last.startswith("bad rows: "))
    if spoil is full:
        assert "No space left" in err or "no space left" in err
    assert (signal.getsignal(INT), signal.getsignal(TERM)) == handlers
    saved = checkpoints.checkpoints(tmp_path / "new")
    if spoil and spoil.__qualname__.startswith("in_a_step"):
        assert [checkpoints.step_of(path) for path in saved] == [1] and "--resume auto" in last
        assert entry([*args, "--resume", "auto"]) == 0  # resumable means so
    elif code in (75, 130, 143) and args[0] == "collect":
        with fake.serving() as server:
            assert (
                entry([part.format(**runs, new=tmp_path / "new", teacher=server.url) for part in COLLECT.split()]) == 0
            )
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".") or ".tmp" in p.name]
    if args[0] == "select" and code:
        leftovers = [name for name in leftovers if name != ".new.scores.jsonl"]  # from which it continues
    assert not leftovers, leftovers


def test_the_table_has_every_verb_and_every_code() -> None:
    reached = {(command.split()[0], code) for code, command, _ in TABLE}
    assert {verb for verb, _ in reached} == set(cli.commands) and {code for _, code in reached} == {
        0,
        1,
        2,
        75,
        130,
        143,
    }
    # demo is train, and so are its codes; active and bench have tests of their own
    for verb in set(cli.commands) - {"active", "bench", "demo"}:
        wanted = {0, 1, 2, 130, 143} - ({1} if verb == "validate" else set())  # which writes nothing
        assert wanted <= {code for of, code in reached if of == verb}, verb


WITH_A_SIGNAL = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Finder())
from qcrd_fast.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "number", "code", "said"),
    [
        ("click", "SIGINT", 130, "qcrd-fast: interrupted"),
        ("torch", "SIGINT", 130, "qcrd-fast: interrupted"),
        ("transformers", "SIGTERM", 143, "qcrd-fast: terminated"),
    ],
)
def test_a_signal_while_something_is_imported(
    module: str, number: str, code: int, said: str, runs: dict[str, str], tmp_path: Path
) -> None:
    """No traceback of half an import, and no error that the import makes of it."""
    command = TRAIN.format(**runs, new=tmp_path / "new").split()
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_SIGNAL.format(module=module, number=number), *command],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (code, "", said)
    assert "Traceback" not in done.stderr


TORN_DOWN = """
import atexit, os, sys
class Held:
    def __del__(self, write=os.write):
        write(2, b"torn down ")
sys.held = Held()
from qcrd_fast.__main__ import main
code = main()
atexit.register(os.write, 2, b"atexit ")
sys.exit(code)
"""


@pytest.mark.parametrize(("processes", "left"), [(None, "atexit torn down "), ("2", "atexit ")])
def test_a_rank_ends_before_its_interpreter_is_torn_down(processes: str | None, left: str) -> None:
    """A late thread of gloo would abort it then; the exit code, output and what other libraries do at exit stay."""
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    if processes:
        environment |= {"WORLD_SIZE": processes, "RANK": "0"}
    for command, code in (["--version"], 0), (["train", "--no-such-option"], 2):
        done = subprocess.run(
            [sys.executable, "-c", TORN_DOWN, *command],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code
        assert bool(done.stdout) == (code == 0)
        assert done.stderr.endswith(left), done.stderr


def test_eval_leaves_the_predictions_of_the_run_alone(runs: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(runs["run"], tmp_path / "run", symlinks=True))
    before = (run / "predictions.jsonl").read_bytes()
    assert entry(["eval", str(run), "--data", runs["rows"], "--max-answer-tokens", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predictions"] == str(run / "eval-rows" / "predictions.jsonl")
    assert len(Path(told["predictions"]).read_text().splitlines()) == told["n"] == 24
    assert (run / "predictions.jsonl").read_bytes() == before
    (run / "eval-link").symlink_to(tmp_path)
    shutil.copy(runs["rows"], tmp_path / "link.jsonl")
    assert entry(["eval", str(run), "--data", str(tmp_path / "link.jsonl")]) == 2
    assert "is a link" in capsys.readouterr().err
