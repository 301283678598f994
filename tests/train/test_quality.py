"""Quality in training: judges by name and by object, weights on `sft-all`, agreeing negatives, resume, old
checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
import yaml

from qcrd_fast.config import DEFAULT_QUALITIES, TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.quality.cases import student_case, teacher_cases
from qcrd_fast.quality.judges import make_judge
from qcrd_fast.quality.votes import vote_score
from qcrd_fast.runs.folder import checkpoint_path
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.judging import Judges
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.run_state import RunState
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.student_answers import StudentAnswers
from qcrd_fast.train.trainer import Trainer, train
from tests.support.short_runs import metrics, same, settings, weights

QUESTION = Question(
    id="q",
    question="Ann has 3 eggs, finds 4 and eats 2. How many are left?",
    gold="5",
    majority="5",
    votes={"5": 3, "9": 1},
    task="number",
    positives=(
        Rationale("First 3 + 4 = 7. Then 7 - 2 = 5.", "5"),
        Rationale("Add: 3 + 4 = 7. Subtract: 7 - 2 = 5.", "5"),
    ),
    negatives=(Rationale("First 3 + 4 = 7. Then 7 + 2 = 9.", "9"),),
)


class Halves:
    """A judge of a study: the first of a question's positives is worth nothing, and so is every second negative."""

    def scores(self, cases):
        return [0.0 if case.rationale == case.question.positives[0] else 0.75 for case in cases]


@pytest.fixture(scope="module")
def student(llama_folder):
    return Student.load(str(llama_folder), PromptSettings())


def candidates_of(student, config, judges):
    """The weights of QUESTION's candidates and the student's own sample, from the objective's first pass."""
    example = make_examples([QUESTION], student, config)[0]
    text = "First 3 + 4 = 7. Then 7 - 2 = 5 are left."
    own = Negative(student.target_ids(text), text, case=student_case(QUESTION, text))
    objective = Objective(student, config, RunState(config.impl, judges or Judges()), contextlib.nullcontext)
    found = example.candidates({"q": own})
    return objective.quality([example], found, [0] * len(found))


def test_positives_and_negatives_have_judges_of_their_own(student):
    config, vote = TrainConfig(negative_source="lagged"), make_judge("vote", [QUESTION])
    n3, n1 = vote_score(3, 4), vote_score(1, 4)
    assert candidates_of(student, config, None) is None
    assert candidates_of(student, config, Judges(vote, vote)).tolist() == pytest.approx([n3, n3, n1, n3])
    assert candidates_of(student, config, Judges(vote, None)).tolist() == pytest.approx([n3, n3, 0, 0])
    assert candidates_of(student, config, Judges(None, vote)).tolist() == pytest.approx([1, 1, n1, n3])
    assert candidates_of(student, config, Judges(Halves(), vote)).tolist() == pytest.approx([0, 0.75, n1, n3])


def test_positives_of_sft_all_are_weighted_and_count_as_before(student):
    config = TrainConfig(method="sft-all", positive_quality="vote")
    one = dataclasses.replace(QUESTION, id="one", positives=QUESTION.positives[:1])
    example, alone = make_examples([QUESTION, one], student, config)
    state = RunState(config.impl, Judges(Halves(), None))
    objective = Objective(student, config, state, contextlib.nullcontext)
    chosen, stats = objective.weigh(MicroBatch([example], {}, 4))
    assert chosen.weight == [0.0, 0.25] and stats["weighed_majority"] == 2 and stats["weight_majority"] == 0.75
    assert objective.weigh(MicroBatch([alone], {}, 4))[0].weight == [0.0]  # nothing of it is worth learning
    state.judges = Judges(make_judge("vote", [QUESTION]), None)
    assert objective.weigh(MicroBatch([example], {}, 4))[0].weight == [0.125, 0.125]
    plain = Objective(student, dataclasses.replace(config, positive_quality=None), None, contextlib.nullcontext)
    assert plain.weigh(MicroBatch([example], {}, 4))[0].weight == [0.125, 0.125]


@pytest.mark.parametrize(
    "options, qualities",
    [
        ({}, DEFAULT_QUALITIES),
        ({"positive_quality": "text"}, ("text", DEFAULT_QUALITIES[1])),
        ({"discriminator": "some/encoder"}, ("discriminator", "discriminator")),
        ({"paper": True}, ("discriminator", "discriminator")),
        ({"paper": True, "positive_quality": "none"}, ("none", "discriminator")),
        ({"discriminator": "none"}, ("none", "none")),
        ({"quality": "vote"}, ("vote", "vote")),
        ({"quality": "text", "negative_quality": "none"}, ("text", "none")),
        ({"discriminator": "none", "negative_quality": "vote"}, ("none", "vote")),
        ({"method": "sft-all", "quality": "vote"}, ("none", "none")),
        ({"method": "sft-all", "positive_quality": "text"}, ("text", "none")),
        ({"method": "dss", "positive_quality": "text"}, ("none", "none")),
    ],
)
def test_qualities_after_the_defaults(options, qualities):
    assert TrainConfig(**options).qualities == qualities
    assert TrainConfig(**options).resolved().qualities == qualities


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"discriminator": "none", "quality": "discriminator"},
            "--discriminator none is --quality none, but --quality disc",
        ),
        ({"discriminator": "none", "quality": "vote"}, "leave one out"),
        ({"discriminator": "none", "negative_quality": "discriminator"}, "--negative-quality discriminator needs one"),
        ({"discriminator": "some/encoder", "quality": "none"}, "no use for --discriminator some/encoder"),
        ({"quality": "votes"}, "did you mean 'vote'"),
        ({"agreeing_negatives": "keep"}, "--agreeing-negatives is one of weigh, drop"),
    ],
)
def test_qualities_at_odds(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


@pytest.fixture(scope="module")
def voted(rows_file, t5_folder, tmp_path_factory):
    """An unbroken run by votes."""
    out = tmp_path_factory.mktemp("voted") / "run"
    train(settings(rows_file, t5_folder, out, quality="vote"))
    return out


def test_a_run_by_votes(voted, rows_file):
    lines = [line for line in metrics(voted) if "loss" in line]
    questions = load_questions(rows_file).questions
    scores = [s for q in questions for s in make_judge("vote", [q]).scores(teacher_cases(q))]
    for line in lines:
        assert line["loss_d"] is None and min(scores) <= line["weight_majority"] <= 1
        assert line["quality_positive"] == line["weight_majority"]
        if line["weight_minority"] is not None:
            assert 1 - max(scores) <= line["weight_minority"] <= 1
        assert line["lagged_agrees"] is not None
    # a student that is hardly trained: every sample is cut or says nothing, and weighs fully
    assert any(line["weight_lagged_unknown"] == 1.0 for line in lines)
    assert not (checkpoint_path(voted, 6) / "discriminator.safetensors").exists()
    resolved = yaml.safe_load((voted / "config.resolved.yaml").read_text())
    assert (resolved["quality"], resolved["positive_quality"], resolved["agreeing_negatives"]) == (
        "vote",
        None,
        "weigh",
    )


@pytest.mark.parametrize("quality", ["vote", "text", "discriminator", "none", None])
def test_killed_and_resumed(quality, rows_file, t5_folder, tmp_path, monkeypatch):
    """Stopped between two saves, within an iteration: metrics, weights and negatives are the unbroken run's."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    changes = {"quality": quality, "agreeing_negatives": "drop", "max_new_tokens": 24, "max_steps": 4,
        "save_steps": 2, "validation_fraction": 0.0}  # fmt: skip
    if quality is None:  # the defaults
        changes |= {"scheme": None, "negative_source": None}
    train(settings(rows_file, t5_folder, whole, **changes))
    real = Trainer._train_step

    class Killed(BaseException):
        pass

    def dies(self):
        if self.step == 3:
            raise Killed
        real(self)

    monkeypatch.setattr(Trainer, "_train_step", dies)
    with pytest.raises(Killed):
        train(settings(rows_file, t5_folder, out, **changes))
    monkeypatch.setattr(Trainer, "_train_step", real)
    train(settings(rows_file, t5_folder, out, resume="auto", **changes))
    assert metrics(out) == metrics(whole) and same(weights(out, 4), weights(whole, 4))
    assert (whole / "negatives").exists() == (quality is not None)
    for path in (whole / "negatives").glob("*"):
        assert (out / "negatives" / path.name).read_bytes() == path.read_bytes()


def test_an_older_checkpoint_is_of_the_discriminator(rows_file, t5_folder, tmp_path):
    """Its options lack the quality: it goes on as it began, whatever the default is by then."""
    out = tmp_path / "run"
    train(settings(rows_file, t5_folder, out, max_steps=3))
    before = out / "config.resolved.yaml"
    options = yaml.safe_load(before.read_text())
    assert options.pop("quality") == "discriminator"
    for name in ("positive_quality", "negative_quality", "agreeing_negatives"):
        del options[name]
    before.write_text(yaml.safe_dump(options))
    for changes, said in (
        ({"quality": "vote"}, "'discriminator', now it is 'vote'"),
        ({"agreeing_negatives": "drop"}, "drop"),
    ):
        with pytest.raises(InputError, match=said):
            train(settings(rows_file, t5_folder, out, max_steps=3, resume="auto", **changes))
    unsaid = dict(quality=None, scheme=None, negative_source=None)
    train(settings(rows_file, t5_folder, out, max_steps=3, resume="auto", **unsaid))
    kept = yaml.safe_load(before.read_text())
    assert (kept["quality"], kept["scheme"], kept["negative_source"]) == ("discriminator", "minmax", "lagged")


@pytest.mark.parametrize("quality", ["vote", "text", "none"])
def test_no_discriminator_is_made_where_none_is_used(quality, rows_file, llama_folder, tmp_path, monkeypatch):
    def made(*_, **__):
        raise AssertionError("a discriminator was made")

    monkeypatch.setattr("qcrd_fast.discriminator.model.Discriminator.__init__", made)
    config = settings(rows_file, llama_folder, tmp_path / "run", quality=quality, max_steps=1)
    assert train(config, dry_run=True)["memory"]["discriminator"] == 0
    train(config)
    mixed = dataclasses.replace(config, negative_quality="discriminator")
    with pytest.raises(AssertionError, match="was made"):
        train(mixed, dry_run=True)


def test_a_judge_of_ones_own(rows_file, llama_folder, tmp_path):
    judge = Halves()
    train(settings(rows_file, llama_folder, tmp_path / "run", max_steps=2), judges=Judges(judge, judge))
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all(0 < line["weight_majority"] < 0.75 and line["loss_d"] is None for line in lines)
    assert not (checkpoint_path(tmp_path / "run", 2) / "discriminator.safetensors").exists()


def test_rows_without_votes_are_said_once(rows_file, llama_folder, tmp_path, caplog):
    rows = [dataclasses.asdict(q) for q in load_questions(rows_file).questions]
    bare = tmp_path / "bare.jsonl"
    keys = ("id", "question", "gold", "majority", "task")
    bare.write_text(
        "".join(
            json.dumps(
                {key: row[key] for key in keys}
                | {
                    side: [{"text": r["text"], "answer": r["answer"]} for r in row[side]]
                    for side in ("positives", "negatives")
                }
            )
            + "\n"
            for row in rows
        )
    )
    train(settings(bare, llama_folder, tmp_path / "run", quality="vote", max_steps=2, validation_fraction=0.0))
    assert caplog.text.count("have no votes") == 1 and "24 of 24 questions" in caplog.text
    assert all(line["weight_majority"] == 1.0 for line in metrics(tmp_path / "run"))


def test_agreeing_samples_are_weighed_or_dropped(rows_file, llama_folder, tmp_path, monkeypatch):
    """The student says what the first positive says, in other words: all of its samples agree."""
    questions = {q.id: q for q in load_questions(rows_file).questions}
    real = StudentAnswers.read

    def parrots(self, step, chunks):
        words = lambda i: f"Well , {questions[i].positives[0].text}"  # noqa: E731
        said = {
            c: {i: dataclasses.replace(n, text=words(i), tokens=[5, 1]) for i, n in some.items()}
            for c, some in chunks.items()
        }
        return real(self, step, said)

    monkeypatch.setattr(StudentAnswers, "read", parrots)
    for choice in ("weigh", "drop"):
        train(
            settings(rows_file, llama_folder, tmp_path / choice, quality="vote", agreeing_negatives=choice, max_steps=2)
        )
        for line in (line for line in metrics(tmp_path / choice) if "loss" in line):
            assert line["lagged_agrees"] == 1.0
            if choice == "weigh":
                assert 0 < line["weight_lagged_agrees"] < 0.5 and line["active_hinge_lagged"] is not None
            else:
                assert line["weight_lagged_agrees"] is None and line["active_hinge_lagged"] is None


def test_a_discriminator_that_is_blind_is_said(rows_file, llama_folder, tmp_path, caplog):
    """It weighs samples that agree as those that differ."""
    from qcrd_fast.train.trainer import FEWEST_TO_COMPARE

    with caplog.at_level("WARNING"):
        train(settings(rows_file, llama_folder, tmp_path / "run", max_steps=2))
    assert "does not tell them apart" not in caplog.text  # nothing was read

    class Blind(Trainer):
        def _train_step(self):
            super()._train_step()
            n = FEWEST_TO_COMPARE
            self.weights_seen.update(weighed_lagged_agrees=n, weighed_lagged_differs=n)
            self.weights_seen.update(weight_lagged_agrees=0.4 * n, weight_lagged_differs=0.41 * n)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr("qcrd_fast.train.trainer.Trainer", Blind)
        train(settings(rows_file, llama_folder, tmp_path / "blind", max_steps=2))
    assert "weigh 0.400 as negatives, those that give another 0.410" in caplog.text and "--quality vote" in caplog.text


def test_what_a_cut_sample_weighs_does_not_depend_on_the_chunks():
    """Only on the iteration's samples up to its step: with more processes, chunks are longer."""
    questions = [dataclasses.replace(QUESTION, id=f"q{i}") for i in range(12)]
    said = [("So 5.", [3, 1]), ("So 9.", [3, 1]), ("So", [3])]
    found = []
    for size in (4, 12):
        config = TrainConfig(per_device_train_batch_size=2, iteration_steps=4, sample_batch_size=size, max_steps=8)
        schedule = Schedule(len(questions), config)
        answers = StudentAnswers(questions, schedule, eos=1)
        found.append({})
        for step in (0, 1, 2, 3, 1, 4, 5):  # once back, as the discriminator's update goes
            iteration, chunk = schedule.chunk(step)
            chunks = {
                c: {
                    questions[i].id: Negative(said[i % 3][1], said[i % 3][0])
                    for i in schedule.chunk_questions(iteration, c)
                }
                for c in range(chunk + 1)
            }
            read = answers.read(step, chunks)
            for index in schedule.questions(step):
                case = read[questions[index].id].case
                assert case.agrees is {0: True, 1: False, 2: None}[index % 3]
                found[-1][step, index] = case.expected
    assert found[0] == found[1]
    expected = [value for value in found[0].values() if value is not None]
    assert expected and all(0 <= value <= 1 for value in expected) and len(set(expected)) > 1
