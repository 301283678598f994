"""Checkpoints that were cut, deleted or flipped: never loaded, always named (trials 4 and 5 of docs/reliability.md)."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from qcrd_fast.runs import checkpoints
from qcrd_fast.utils.files import write_json
from tests.support.crash_run import Crashes
from tests.support.faults import damage
from tests.support.warm import differences

CUTS = ("missing", "0", "8", "half", "last")


@pytest.fixture(scope="module", params=[0, 1], ids=["t5", "llama"])
def finished(request, crashes: Crashes, tmp_path_factory):
    """(the unbroken run, a copy to damage): checkpoint-4, which is the best, and checkpoint-6."""
    whole = crashes.wholes[request.param]
    copied = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(whole.run, copied, symlinks=True)
    return whole, copied


def needed(run: Path, step: int) -> list[Path]:
    """The files that a resume at a step reads: those of the checkpoint, and the snapshots that it names."""
    folder = run / f"checkpoint-{step}"
    snapshots = json.loads((folder / "state.json").read_text())["snapshots"]
    return [*sorted(folder.iterdir()), *(run / "snapshots" / f"iteration-{int(i):05d}.safetensors" for i in snapshots)]


def refused(run: Path, path: Path, how: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """With `path` damaged, the checkpoint before it is chosen and a warning names the file."""
    kept = path.read_bytes()
    caplog.clear()
    damage(path, how, random.Random(seed))
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest_checkpoint(run, resume=True)
    path.write_bytes(kept)
    assert found == (None if path in needed(run, 4) else run / "checkpoint-4"), f"{path.name} {how}, seed {seed}"
    assert path.name in caplog.text, f"{path.name} {how}, seed {seed}: {caplog.text}"


class TestTrial4:
    """Each file missing, or cut to 0, 8, half or all but one of its bytes: named, and the checkpoint before it is used;
    exit 1 where there is none."""

    @pytest.mark.parametrize("how", CUTS)
    def test_each_file_is_named(self, finished, how: str, caplog) -> None:
        _, run = finished
        files = needed(run, 6)
        assert len(files) >= 10 and checkpoints.latest_checkpoint(run, resume=True) == run / "checkpoint-6"
        for path in files:
            refused(run, path, how, 0, caplog)

    @pytest.mark.parametrize("name, how", [("optimizer.safetensors", "half"), ("MANIFEST.json", "0")])
    def test_the_run_goes_on_from_the_one_before(self, crashes: Crashes, name: str, how: str, tmp_path) -> None:
        whole, run = crashes.wholes[0], tmp_path / "run"
        shutil.copytree(whole.run, run, symlinks=True)
        damage(run / "checkpoint-6" / name, how, random.Random(0))
        done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
        assert done.code == 0, done.err
        assert f"checkpoint-6 is damaged ({name}" in done.err and "resuming from" in done.err
        assert differences(run, whole.run) == []

    def test_without_a_good_one_the_exit_code_is_1(self, crashes: Crashes, tmp_path) -> None:
        whole, run = crashes.wholes[1], tmp_path / "run"
        shutil.copytree(whole.run, run, symlinks=True)
        damage(run / "checkpoint-6" / "state.json", "8", random.Random(0))
        damage(run / "checkpoint-4" / "model.safetensors", "last", random.Random(0))
        before = sorted(p.name for p in run.rglob("*"))
        done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
        assert done.code == 1 and "no intact checkpoint is left to resume from" in done.err, done.err
        assert "state.json" in done.err and "model.safetensors" in done.err
        assert sorted(p.name for p in run.rglob("*")) == before  # nothing is deleted


class TestTrial5:
    """One flipped bit in each file: caught by the manifest, in the manifest too."""

    @pytest.mark.parametrize("seed", range(8))
    def test_a_flip_in_each_file_is_named(self, finished, seed: int, caplog) -> None:
        _, run = finished
        for path in needed(run, 6):
            refused(run, path, "flip", seed, caplog)

    @pytest.mark.parametrize("shares", [0, 3], ids=["one optimizer", "three shares"])
    def test_any_bit_of_the_manifest(self, shares: int, crashes: Crashes, monkeypatch, tmp_path) -> None:
        """Whatever bit is flipped, it no longer lists these files with these digests; read alone, without the files."""
        folder = tmp_path / "checkpoint-6"
        shutil.copytree(crashes.wholes[0].run / "checkpoint-6", folder)
        if shares:  # whose names are a bit apart
            whole = (folder / "optimizer.safetensors").rename(folder / "optimizer-00001-of-00003.safetensors")
            for i in range(2, shares + 1):
                shutil.copy(whole, folder / f"optimizer-0000{i}-of-00003.safetensors")
            listed = {p.name: f"{i:064x}" for i, p in enumerate(sorted(folder.iterdir())) if p.name != "MANIFEST.json"}
            write_json(folder / "MANIFEST.json", {"files": listed})
        text = (folder / "MANIFEST.json").read_bytes()
        digests = json.loads(text)["files"]
        monkeypatch.setattr(checkpoints, "sha256", lambda path: digests[path.name])
        assert checkpoints.find_corruption(folder) is None
        for bit in range(8 * len(text)):
            flipped = bytearray(text)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / "MANIFEST.json").write_bytes(flipped)
            assert checkpoints.find_corruption(folder) is not None, bit

    def test_flips_beside_the_checkpoint(self, crashes: Crashes, tmp_path) -> None:
        """Sampled negatives are drawn again, a damaged line of the log is passed over, temporary files are cleared."""
        whole, run = crashes.wholes[0], tmp_path / "run"
        shutil.copytree(whole.run, run, symlinks=True)
        shutil.rmtree(run / "checkpoint-6")
        for path in (run / "negatives").iterdir():
            damage(path, "flip", random.Random(3))
        (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"step": 5, "lo')
        (run / ".tmp-checkpoint-5").mkdir()
        for name in (".iteration-00002.safetensors.tmp", ".tmpAbCdEf"):
            (run / "snapshots" / name).write_bytes(b"half")
        done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
        assert done.code == 0 and "passed over 1 damaged line" in done.err, done.err
        assert not list(run.rglob(".tmp*")) and not list(run.rglob(".*.tmp"))
        wrong = differences(run, whole.run)
        assert wrong in ([], ["negatives/iteration-00000.jsonl"]), wrong  # nobody asks for those of a past iteration
