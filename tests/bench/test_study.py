"""The study: its problems and teacher, judges and rules by hand, its objective beside the product's, a run that
resumes."""

import csv
import dataclasses
import functools
import random

import pytest
from qcrd_fast.bench.study import __main__ as study
from qcrd_fast.bench.study import judges, objective, problems, runs, students

from qcrd_fast.config import PARTS, TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.judging import Judges
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import Objective
from qcrd_fast.utils.device import make_autocast

ASKED = "Ann has 3 red and 4 blue keys and gives 2 to each of 2 others. How many are left?"
SOUND = "First 3 + 4 = 7. Then 2 * 2 = 4. So 7 - 4 = 3."


@pytest.mark.parametrize(
    "chain, sound, faithful",
    [
        (SOUND, True, True),
        ("Multiply: 2 * 2 = 4. Add: 4 + 3 = 7. Subtract: 7 - 4 = 3.", True, True),  # sums and factors in any order
        ("First 3 + 4 = 8. Then 2 * 2 = 5. So 8 - 5 = 3.", False, False),  # false equations
        ("There are 9 - 6 = 3.", False, False),  # numbers from nowhere
        ("First 4 - 2 = 2. So 2 + 2 = 4.", False, False),  # another answer
        ("First 4 + 2 = 6. So 6 - 3 = 3.", True, False),  # holds, but is no reason
        ("So 3.", False, False),
    ],
)
def test_soundness_by_hand(chain, sound, faithful):
    problem = problems.Problem(ASKED, ((3, "+", 4), (2, "*", 2), (7, "-", 4)))
    assert problems.is_sound(chain, ASKED, "3") is sound
    assert problems.is_faithful(chain, problem) is faithful


@pytest.mark.parametrize("task", problems.TASKS)
def test_the_teacher_is_right_for_the_wrong_reason_as_often_as_it_is_meant_to_be(task):
    rng = random.Random(1)
    drawn = problems.draw_problems(task, 400, rng)
    assert len({p.text for p in drawn}) == 400
    right, sound = 0, 0
    for problem in drawn:
        assert problems.is_sound(
            problems.write_chain([(s, problems.result(s)) for s in problem.steps], rng),
            problem.text,
            str(problem.answer),
        )
        for chain, answer in set(problems.teach(problem, rng)):
            if answer == str(problem.answer):
                right, sound = right + 1, sound + problems.is_sound(chain, problem.text, answer)
    assert 2.5 < right / 400 < 4.5 and 0.48 < sound / right < 0.64
    again = random.Random(1)
    assert problems.draw_problems(task, 400, again) == drawn


def test_no_word_of_a_task_is_unknown_and_no_neutral_text_reasons():
    words = set(problems.vocabulary())
    rng = random.Random(9)
    for task in problems.TASKS:
        for row in problems.write_rows(task, problems.draw_problems(task, 100, rng), rng):
            text = " ".join([row["question"], *(s["rationale"] for s in row["samples"])])
            assert set(problems.WORD.findall(text)) <= words
    for _, prompt, target in problems.lookup_pairs(100, rng):
        assert not set(prompt.partition("How many")[2].split()) & {"left", "both", "all", "than", "does"}
        assert all(problems.OPERATIONS[o](a, b) == c for a, o, b, c in problems.stated_steps(target))


def question(*chains, negatives=()):
    votes = {"3": len(chains), **({"4": len(negatives)} if negatives else {})}
    made = [tuple(Rationale(text, answer) for text in texts) for texts, answer in ((chains, "3"), (negatives, "4"))]
    return Question(
        "q", ASKED, gold="3", majority="3", votes=votes, task="number", positives=made[0], negatives=made[1]
    )


def test_judges_by_hand():
    forced, lucky = "First 3 + 4 = 9. Then 2 * 2 = 4. So 9 - 4 = 3.", "There are 9 - 6 = 3."
    asked = question(SOUND, "3 + 4 = 7. 2 * 2 = 4. 7 - 4 = 3.", forced, lucky, negatives=["3 + 4 = 7. 7 - 3 = 4."])
    assert judges.vote(asked, SOUND, "3") == pytest.approx(4.5**2 / (4.5**2 + 1.5**2))
    assert judges.vote(asked, SOUND, "9") == pytest.approx(0.5**2 / (0.5**2 + 5.5**2))
    assert [judges.traced(asked, t, "3") for t in (SOUND, forced, lucky)] == [1.0, 0.05, 0.05]
    assert [judges.equations(asked, t, "3") for t in (SOUND, forced, lucky)] == [1.0, 0.05, 1.0]
    # 7 is in two of four other chains, 4 in three of them that are not this one
    assert judges.consensus(asked, SOUND, "3") == pytest.approx(((2 + 0.5) / 5 + (3 + 0.5) / 5) / 2)
    assert (
        judges.consensus(asked, SOUND, "3") > judges.consensus(asked, forced, "3") > judges.consensus(asked, lucky, "3")
    )
    problem = problems.Problem(ASKED, ((3, "+", 4), (2, "*", 2), (7, "-", 4)))
    assert [judges.oracle({"q": problem})(asked, t, "3") for t in (SOUND, forced)] == [1.0, 0.02]


def test_gates_by_hand():
    positives = [[1, 2, 3, 9], [1, 2, 4, 9]]
    assert objective.gated([1, 2, 5, 9], positives, "all") == [0, 1, 2, 3]
    assert objective.gated([1, 2, 5, 9], positives, "different") == [2]
    assert objective.gated([1, 2, 5, 7], positives, "first") == [2]
    assert objective.gated([1, 2, 4], positives, "first") == []


@pytest.mark.parametrize(
    "options, rules",
    [
        ({"method": "sft-all"}, objective.Rules("mean")),
        ({"method": "sft-all", "reasoning_task": True}, objective.Rules("wmean")),
        ({"method": "qcrd", "positive_select": "min", "negative_source": "none"}, objective.Rules("min")),
        (
            {"method": "qcrd", "scheme": "mean", "negative_source": "minority"},
            objective.Rules("mean", negatives="minority"),
        ),
        (
            {"method": "qcrd", **PARTS, "quality": "none"},
            objective.Rules("min", negatives="both", negative_select="max"),
        ),
    ],
)
def test_rules_that_the_product_has_give_its_gradients(options, rules, rows_file, llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    config = TrainConfig.from_dict({**options, "discriminator": "none", "delta": 6.0})
    loaded = sorted(load_questions(str(rows_file), split="train").questions, key=lambda q: -len(q.negatives))[:3]
    examples = make_examples(loaded, student, config)
    text = "First 3 + 4 = 9 apples. Then 9 - 2 = 5."
    lagged = {examples[0].id: Negative(student.target_ids(text), text)} if rules.negatives == "both" else {}
    study_objective = functools.partial(objective.StudyObjective, rules=rules, total_steps=10)
    gradients, losses = [], []
    for make in (Objective, study_objective):
        made = make(student, config, None, make_autocast(student.device, False))
        student.model.zero_grad(set_to_none=True)
        losses.append(made.step(examples, lagged, 4, 0, 0)[0])
        gradients.append([p.grad.clone() for p in student.model.parameters()])
    assert losses[0]["loss_pred"].item() == pytest.approx(losses[1]["loss_pred"].item(), rel=1e-4)
    for expected, found in zip(*gradients, strict=True):
        assert (expected - found).norm() <= 1e-4 * expected.norm().clamp(min=1e-3)


def test_a_softmin_leans_to_the_likeliest_and_a_judge_weighs(rows_file, llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    config = TrainConfig(method="sft-all", alpha_pred=0.0)
    loaded = [q for q in load_questions(str(rows_file), split="train").questions if len(q.positives) > 1][:2]
    examples = make_examples(loaded, student, config)

    def loss(judge=None, **rules):
        judged = Judges(judges.RuleJudge(judge) if judge else None)
        made = objective.StudyObjective(
            student, config, judged, make_autocast(student.device, False), rules=objective.Rules(**rules), total_steps=1
        )
        return made.step(examples, {}, 2, 0, 0)[0]["loss_cl"].item()

    assert (
        loss(positives="min") <= loss(positives="softmin", temperature=0.01) + 1e-6 <= loss(positives="softmin") + 2e-6
    )
    assert loss(positives="softmin") < loss(positives="mean") < loss(positives="max")
    firsts = {q.positives[0].text for q in loaded}
    only_first = loss(lambda q, text, a: float(text in firsts), positives="wmean")
    examples = [dataclasses.replace(e, positives=e.positives[:1]) for e in examples]
    assert loss(positives="mean") == pytest.approx(only_first, rel=1e-5)


def test_a_study_runs_once_each_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(students, "PHASES", (("symbol_pairs", 2, 0), ("lookup_pairs", 1, 0)))
    monkeypatch.setattr(runs, "TEST_QUESTIONS", 12)
    options = [
        "--epochs",
        "1",
        "--questions",
        "16",
        "--results",
        str(tmp_path / "study.csv"),
        "--cache",
        str(tmp_path / "cache"),
        "--families",
        "decoder,t5",
    ]
    assert study.main([*options, "--arms", "sft-all", "--seeds", "0"]) == 0
    assert (
        study.main([*options, "--arms", "sft-all,wmean/consensus2", "--seeds", "0", "--budget-minutes", "1e-9"]) == 75
    )
    assert study.main([*options, "--arms", "sft-all,wmean/consensus2", "--seeds", "0,1"]) == 0
    with open(tmp_path / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 == len({(r["family"], r["arm"], r["seed"]) for r in rows})
    assert all(len(runs.from_hex(r["sounds"], 12)) == 12 for r in rows)
    monkeypatch.setattr(runs.from_hex, "__defaults__", (12,))
    capsys.readouterr()
    assert study.main([*options, "--table"]) == 0
    printed = capsys.readouterr().out
    assert "screen: mix, decoder" in printed and "wmean/consensus2 | 2 |" in printed
    assert study.main([*options, "--arms", "none-such"]) == 2
    assert "'none-such' is none of" in capsys.readouterr().err


def test_data_of_a_seed_are_one_for_all_arms_and_apart_from_the_tests(tmp_path):
    drawn = []
    for arm, stage, seed in (
        ("dss", "screen", 0),
        ("sft-all", "screen", 0),
        ("dss", "screen", 1),
        ("dss", "confirm", 0),
    ):
        folder = tmp_path / f"{arm}-{stage}-{seed}"
        folder.mkdir()
        path, by_id, tests = runs.draw_data(runs.Case(stage, "shop", "decoder", arm, seed), folder)
        drawn.append((path.read_text(), {p.text for p in by_id.values()}, {p.text for p in tests}))
        assert not drawn[-1][1] & drawn[-1][2]
    assert drawn[0][0] == drawn[1][0] and len({text for text, _, _ in drawn}) == 3
    assert drawn[0][2] == drawn[2][2] and not drawn[0][2] & drawn[3][2]
