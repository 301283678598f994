"""Full disks, folders that cannot be written, two runs in one folder (trials 6 to 8 of docs/reliability.md)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcrd_fast.runs import checkpoints
from tests.support.crash_run import Crashes
from tests.support.faults import small_disk
from tests.support.warm import ROOT, differences

ROOM = re.compile(r"(\d+) bytes needed, (\d+) bytes free")


def unfinished(run: Path) -> list[str]:
    return [str(p.relative_to(run)) for p in run.rglob("*") if p.name.startswith(".") and p.name != ".lock"]


@pytest.fixture
def disk(tmp_path):
    """disk(bytes) -> a folder on a tmpfs of that size; a skip where mounting is refused."""
    mounted, stack = [], contextlib.ExitStack()

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        try:
            stack.enter_context(small_disk(folder, size))
        except (PermissionError, FileNotFoundError) as error:
            pytest.skip(f"mounting a tmpfs is refused ({error}); the injected trials cover it")
        mounted.append(folder)
        return folder

    with stack:
        yield make


class TestTrial6:
    """A disk that is full at the start, during a save, at a line of the log: exit 1 with the bytes needed and free,
    earlier checkpoints intact, no temporary file, and a resume that is exact."""

    def test_no_room_to_begin(self, crashes: Crashes, disk) -> None:
        whole, run = crashes.wholes[0], disk(2**19) / "run"
        done = crashes.warm.run(crashes.args(whole.student, run))
        assert done.code == 1, done.err
        needed, free = map(int, ROOM.search(done.err).groups())
        checkpoint_size = sum(p.stat().st_size for p in (whole.run / "checkpoint-6").iterdir())
        assert checkpoint_size < needed < 2 * checkpoint_size and free < 2**19
        assert {p.name for p in run.iterdir()} <= {".lock", "run.log"}  # before anything was begun

    def test_not_even_room_for_the_lock(self, crashes: Crashes, disk) -> None:
        folder = disk(2**16)
        with pytest.raises(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**10))
        done = crashes.warm.run(crashes.args(crashes.wholes[0].student, folder / "run"))
        assert done.code == 1 and "Traceback" not in done.err and ROOM.search(done.err), done.err

    def test_full_during_a_save(self, crashes: Crashes, disk) -> None:
        """The disk has room for the first checkpoint, not for the next one beside it."""
        whole = crashes.wholes[0]
        size = sum(p.stat().st_size for p in (whole.run / "checkpoint-6").iterdir())
        folder = disk(int(1.9 * size))
        run = folder / "run"
        done = crashes.warm.run(crashes.args(whole.student, run))
        assert done.code == 1 and "cannot write" in done.err and "Traceback" not in done.err, done.err
        assert (
            ROOM.search(done.err) and "earlier checkpoints are intact" in done.err and "may fill its disk" in done.err
        )
        assert checkpoints.latest_checkpoint(run, resume=True) == run / "checkpoint-2" and not unfinished(run)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(folder)], check=True)
        done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
        assert done.code == 0, done.err
        assert differences(run, whole.run) == []

    @pytest.mark.parametrize(
        "what",
        [
            "write metrics.jsonl",
            "write .tmp-checkpoint-4/optimizer.safetensors",
            "write .tmp-checkpoint-4/tokenizer.json",
            "write snapshots/.iteration-00001.safetensors.tmp",
            "write .predictions.jsonl.tmp",
        ],
    )
    def test_no_byte_fits_from_there_on(self, crashes: Crashes, what: str) -> None:
        """Injected. `python -m tests.support.crash_run --every-point --do full` does it at every operation on a
        file."""
        whole = crashes.wholes[0]
        wrong = crashes.trial(whole, point=whole.points.index(what), do="full")
        assert wrong is None, wrong


class TestTrial7:
    """An output folder that is read-only, cannot be made, is missing or not empty: exit 2 before the model is looked at
    (there is none), nothing deleted, and the option that helps is named."""

    def refuse(self, crashes: Crashes, out: str | Path, *, says: str) -> None:
        done = crashes.warm.run(crashes.args(Path("no-such-student"), out))
        assert done.code == 2 and says in done.err and "--output-dir" in done.err, done.err
        assert "no-such-student" not in done.err and "Traceback" not in done.err

    def test_read_only(self, crashes: Crashes, disk) -> None:
        folder = disk(2**20)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        self.refuse(crashes, folder / "run", says="Read-only file system; choose another folder")
        self.refuse(crashes, folder, says="Read-only file system; choose another folder")

    def test_cannot_be_made(self, crashes: Crashes, tmp_path) -> None:
        (tmp_path / "file").write_text("mine")
        self.refuse(crashes, tmp_path / "file" / "run", says="Not a directory")
        self.refuse(crashes, tmp_path / "file", says="File exists")
        self.refuse(crashes, "/proc/no/run", says="cannot write to /proc/no/run")
        assert (tmp_path / "file").read_text() == "mine"

    def test_not_given(self, crashes: Crashes) -> None:
        args = crashes.args(Path("no-such-student"), Path("x"))
        at = args.index("--output-dir")
        done = crashes.warm.run(args[:at] + args[at + 2 :])
        assert done.code == 2 and "train needs --output-dir" in done.err, done.err

    def test_not_empty(self, crashes: Crashes, tmp_path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        self.refuse(
            crashes, tmp_path, says="is not empty (thesis.tex is there); continue with --resume auto or choose another"
        )
        assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["thesis.tex"]

    def test_a_missing_folder_is_made_and_with_resume_too(self, crashes: Crashes, tmp_path) -> None:
        done = crashes.warm.run(
            crashes.args(crashes.wholes[1].student, tmp_path / "a" / "b", max_steps=1, resume="auto")
        )
        assert done.code == 0 and (tmp_path / "a" / "b" / "checkpoint-1").is_dir(), done.err


class TestTrial8:
    """Two runs in one folder: the second exits with 2 within 2 s, before torch is imported, and names the first's PID;
    the lock of a run that was killed is no obstacle."""

    def test_the_second_run_is_refused_and_a_stale_lock_is_not(self, crashes: Crashes, tmp_path) -> None:
        whole, run = crashes.wholes[1], tmp_path / "run"
        args = crashes.args(whole.student, run, resume="auto")
        first = crashes.warm.start(args)
        end = time.monotonic() + 30
        while not (run / ".lock").exists() or not (run / ".lock").read_text().strip():
            assert time.monotonic() < end, "the first run has not begun"
            time.sleep(0.01)
        os.kill(first[0], signal.SIGSTOP)
        code = (
            "import sys; from cli.main import entry; c = entry(sys.argv[1:]); "
            "print('torch' in sys.modules); sys.exit(c)"
        )
        second = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
        assert second.returncode == 2 and f"is in use by process {first[0]}" in second.stderr, second.stderr
        assert second.stdout == "False\n"  # so it is said at once
        os.kill(first[0], signal.SIGKILL)
        assert crashes.warm.wait(first).code == -signal.SIGKILL
        assert (run / ".lock").read_text().strip() == str(first[0])  # stale
        done = crashes.warm.run(args)
        assert done.code == 0, done.err
        assert differences(run, whole.run) == []
