"""Which student speaks, what survives in the store and in the ring, and that drawing ahead changes nothing."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest
import torch
from safetensors import SafetensorError

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.generation.engine import Cancelled
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.methods import samples_student
from qcrd_fast.train.negatives import PREFETCH_CHUNKS, LaggedNegatives, SamplingPrompt
from qcrd_fast.train.overlap import SamplingWorker, choose_overlap
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.snapshots import Snapshots
from qcrd_fast.utils.determinism import deterministic, deterministic_already, require_deterministic

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["t5_folder", "llama_folder"])
def student(request):
    return Student.load(str(request.getfixturevalue(request.param)), PromptSettings())


def lagged(folder, student=None, kind="serial", **options):
    """Negatives of 8 questions with steps of 2, chunks of 4, iterations of 4 steps, unless told otherwise."""
    shape = dict(
        negative_source="lagged",
        per_device_train_batch_size=2,
        sample_batch_size=4,
        max_new_tokens=6,
        negative_lag=1,
        max_steps=12,
    )
    config = TrainConfig(**(shape | options))
    questions = (
        [SamplingPrompt(f"q{i}", student.source_ids(EXPLAIN, f"Ann has {i} apples.")) for i in range(8)]
        if student
        else []
    )
    snapshots = Snapshots(folder / "snapshots")
    folder.mkdir(exist_ok=True)
    schedule = Schedule(8, config)
    return LaggedNegatives(
        student, questions, schedule, snapshots, folder / "negatives", config,
        lambda: torch.autocast("cpu", enabled=False), SamplingWorker(kind, CPU),
    )  # fmt: skip


@pytest.mark.parametrize(
    "lag, expected", [(1, [0, 0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 0, 1, 2, 3]), (5, [0, 0, 0, 0, 0, 0, 1])]
)
def test_iteration_t_listens_to_iteration_t_minus_j_and_before_that_to_the_initial_student(tmp_path, lag, expected):
    assert [lagged(tmp_path, negative_lag=lag).source_iteration(t) for t in range(7)] == expected


def test_fixed_is_always_the_initial_student(tmp_path):
    assert {lagged(tmp_path, negative_source="fixed").source_iteration(t) for t in range(7)} == {0}


# Snapshots


@pytest.mark.parametrize("in_memory", [0, 2])
def test_snapshots_come_back_and_old_ones_go(tmp_path, in_memory):
    snapshots = Snapshots(tmp_path / "snapshots", in_memory)
    model = torch.nn.Linear(3, 2)
    for iteration in range(4):
        with torch.no_grad():
            model.weight.fill_(iteration + 0.5)
        snapshots.save(iteration, model)
    place = model.weight.data_ptr()
    for iteration in (1, 3, 2):  # with two in memory, 1 comes from disk
        snapshots.load_into(iteration, model)
        assert model.weight.eq(iteration + 0.5).all() and model.weight.data_ptr() == place
    snapshots.wait()
    theirs = snapshots.folder / "iteration-00001 (copy).safetensors"
    theirs.touch()
    snapshots.prune(oldest=2, keep_initial=True)
    assert sorted(p.name for p in snapshots.folder.iterdir()) == sorted(
        [theirs.name, *(snapshots.path(i).name for i in (0, 2, 3))]
    )
    assert sorted(snapshots.digests(oldest=2)) == [2, 3]
    assert [snapshots.has(i) for i in (1, 2, 3, 4)] == [False, True, True, False]


def test_a_snapshot_is_the_student_when_it_was_taken(tmp_path):
    """Training goes on in place while the file is being written."""
    snapshots, model, allowed = Snapshots(tmp_path / "snapshots"), torch.nn.Linear(300, 300), threading.Event()
    with torch.no_grad():
        model.weight.fill_(1.0)
    snapshots._writer.submit(allowed.wait)
    snapshots.save(0, model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert not snapshots.path(0).exists()
    allowed.set()
    snapshots.load_into(0, model)
    assert model.weight.eq(1.0).all()


def test_a_snapshot_being_written_can_be_loaded_by_another_thread(tmp_path):
    snapshots, model, allowed = Snapshots(tmp_path / "snapshots"), torch.nn.Linear(3, 2), threading.Event()
    snapshots._writer.submit(allowed.wait)
    snapshots.save(0, model)
    waiting = threading.Thread(target=snapshots.wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and snapshots.has(0)
    threading.Timer(0.1, allowed.set).start()
    snapshots.load_into(0, model)
    waiting.join()


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_snapshot_that_cannot_be_written_is_an_error_where_its_digest_is_needed(error, tmp_path, monkeypatch):
    def full(_, path):
        path.write_bytes(b"half")
        raise error("No space left on device")

    monkeypatch.setattr("qcrd_fast.train.snapshots.save_file", full)
    snapshots = Snapshots(tmp_path)
    snapshots.save(0, torch.nn.Linear(2, 2))
    with pytest.raises(RunError, match=r"iteration-00000.*No space left.*12 bytes needed, \d+ bytes free"):
        snapshots.digests(0)
    assert list(tmp_path.iterdir()) == []


# The store


def texts(negatives, steps) -> list[dict[str, str]]:
    return [{i: n.text for i, n in negatives.for_step(step).items()} for step in steps]


@pytest.fixture
def filled(student, tmp_path):
    """(negatives of iteration 0, the path and bytes of its file)."""
    said = lagged(tmp_path / "a", student)
    said.snapshots.save(0, student.model)
    said.of_iteration(0)
    path = said.store.path(0)
    return said, path, path.read_bytes()


def test_each_question_of_a_chunk_once_and_the_file_says_so(filled):
    said, _, data = filled
    records = [json.loads(line) for line in data.splitlines()]
    assert [r["end"] for r in records if "end" in r] == [4, 4]
    assert sorted(r["id"] for r in records if "id" in r) == [f"q{i}" for i in range(8)]
    assert {i: n.tokens for i, n in said.of_iteration(0).items()} == {
        r["id"]: r["tokens"] for r in records if "id" in r
    }


@pytest.mark.parametrize("place", ["tail cut", "text", "tokens", "count", "line lost", "line doubled", "another's row"])
def test_damage_is_found_and_drawn_again(filled, student, place):
    said, path, data = filled
    lines = data.splitlines(keepends=True)
    damaged = {
        "tail cut": data[:-9],
        "text": data.replace(b'"text": "', b'"text": "x', 1),
        "tokens": data.replace(b'"tokens": [', b'"tokens": [7, ', 1),
        "count": data.replace(b'"end": 4', b'"end": 5', 1),
        "line lost": b"".join(lines[:1] + lines[2:]),
        "line doubled": b"".join(lines[:1] + lines),
        "another's row": data.replace(lines[0], lines[5], 1),
    }[place]
    assert damaged != data
    path.write_bytes(damaged)
    again = lagged(path.parent.parent, student)
    again.snapshots.known = said.snapshots.known
    drawn = again.of_iteration(0)
    assert {i: n.tokens for i, n in drawn.items()} == {i: n.tokens for i, n in said.of_iteration(0).items()}
    assert path.read_bytes() == data
    assert again.tokens > 0


def test_every_flipped_byte_of_a_chunk_is_found(filled, student):
    """In the middle too: what is read back is what was said, or it is drawn again."""
    said, path, data = filled
    wanted = {i: (n.tokens, n.text) for i, n in said.of_iteration(0).items()}
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        kept = lagged(path.parent.parent, student).store.chunks(0)
        for chunk in kept.values():
            assert all((n.tokens, n.text) == wanted[i] for i, n in chunk.items())


def test_a_whole_store_is_read_and_nothing_drawn(filled, student):
    said, path, data = filled
    again = lagged(path.parent.parent, student)
    assert texts(again, range(4)) == texts(said, range(4))
    assert again.tokens == 0 and again._sampler is None and path.read_bytes() == data


# Beside training


def drift(student, iteration: int) -> None:
    """What training would do to the weights."""
    generator = torch.Generator().manual_seed(iteration)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "lag, iteration_steps", [(1, 4), (2, 4), (1, 1)]
)  # 1: an iteration of one chunk, never ahead of its snapshot
def test_drawing_ahead_says_the_same(student, tmp_path, lag, iteration_steps):
    import copy

    said = {}
    for kind in ("serial", "stream"):
        learner = copy.copy(student)
        learner.model = copy.deepcopy(student.model)
        negatives = lagged(tmp_path / kind, learner, kind, negative_lag=lag, iteration_steps=iteration_steps)
        ahead = []
        for step in range(12):
            if step % iteration_steps == 0:
                if step:
                    negatives.of_iteration(step // iteration_steps - 1)
                negatives.snapshots.save(step // iteration_steps, learner.model)
            negatives.for_step(step)
            ahead.append(len(negatives._prefetched))
            drift(learner, step)
        negatives.close()
        files = sorted((tmp_path / kind / "negatives").iterdir())
        said[kind] = {path.name: path.read_text() for path in files}
        assert max(ahead) == (0 if kind == "serial" else 1 if iteration_steps == 1 else PREFETCH_CHUNKS)
        assert 0 <= negatives.overlap_fraction <= 1 and negatives.tokens_per_s > 0
        assert kind == "stream" or negatives.overlap_fraction == 0
        assert ahead[-1] == 0  # never beyond the last step
    assert said["serial"] == said["stream"] and len(said["serial"]) == 12 // iteration_steps


def test_what_fails_ahead_fails_where_it_is_needed(student, tmp_path, monkeypatch):
    negatives = lagged(tmp_path, student, "stream")
    negatives.snapshots.save(0, student.model)
    negatives.for_step(0)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    for begun in negatives._prefetched.values():
        begun.result()
    monkeypatch.setattr(type(negatives._sampler), "generate", fail)
    negatives.for_step(2)  # drawn before; what is begun now fails
    with pytest.raises(RuntimeError, match="out of memory"):
        negatives.for_step(4)
        negatives.for_step(6)
    negatives.close()


def test_closing_stops_what_runs(student, tmp_path):
    negatives = lagged(tmp_path, student, "stream", max_new_tokens=10_000, sample_batch_size=2)
    negatives.snapshots.save(0, student.model)
    negatives.prepare()
    negatives._sampler.eos = -1  # no sample ends early
    running = negatives._draw(0, 0)
    while not negatives._sampler.new_B.any():
        time.sleep(0.01)
    negatives.close()
    assert isinstance(running.exception(timeout=10), Cancelled)


@pytest.mark.parametrize(
    "kind, message", [("priority", "needs a GPU"), ("green-context", "needs a GPU"), ("strem", "did you mean 'stream'")]
)
def test_overlaps_that_cannot_be_are_refused(kind, message):
    with pytest.raises(InputError, match=message):
        choose_overlap(TrainConfig(overlap=kind), CPU)


def test_what_has_no_deterministic_form_is_refused_with_deterministic():
    wanted = TrainConfig(negative_source="lagged", deterministic=True, negative_top_p=0.9)
    with pytest.raises(InputError, match=r"--negative-top-p 0\.9"):
        require_deterministic(wanted, torch.device("cuda"), samples_student(wanted))
    for config in (dataclasses.replace(wanted, method="dss"), dataclasses.replace(wanted, negative_top_p=1.0)):
        require_deterministic(config, torch.device("cuda"), samples_student(config))
    require_deterministic(wanted, CPU, True)
    with deterministic(True):
        with deterministic_already():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()


def test_the_default_is_serial():
    assert choose_overlap(TrainConfig(), CPU) == "serial" == choose_overlap(TrainConfig(), torch.device("cuda"))
    assert choose_overlap(TrainConfig(overlap="stream"), CPU) == "stream"
