"""The study: judges and rules by hand, its objective beside the product's, a run that resumes."""

import csv
import dataclasses
import functools
import itertools
import random

import numpy as np
import pytest
from qcrd_fast.bench.study import __main__ as study
from qcrd_fast.bench.study import judges, mentors, objective, runs, tables
from qcrd_fast.bench.study.arms import ARMS, COMMON

from qcrd_fast.config import PAPER, PAPER_SELECTS, PARTS, QUALITY_OPTIONS, TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.demo import problems, students
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.judging import Judges
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.run_state import RunState
from qcrd_fast.utils.device import make_autocast

ASKED = "Ann has 3 red and 4 blue keys and gives 2 to each of 2 others. How many are left?"
SOUND = "First 3 + 4 = 7. Then 2 * 2 = 4. So 7 - 4 = 3."


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
        losses.append(made.step(MicroBatch(examples, lagged, 4))[0])
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
        state = RunState(config.impl, Judges(judges.RuleJudge(judge) if judge else None))
        made = objective.StudyObjective(
            student, config, state, make_autocast(student.device, False), rules=objective.Rules(**rules), total_steps=1
        )
        return made.step(MicroBatch(examples, {}, 2))[0]["loss_cl"].item()

    assert (
        loss(positives="min") <= loss(positives="softmin", temperature=0.01) + 1e-6 <= loss(positives="softmin") + 2e-6
    )
    assert loss(positives="softmin") < loss(positives="mean") < loss(positives="max")
    firsts = {q.positives[0].text for q in loaded}
    only_first = loss(lambda q, text, a: float(text in firsts), positives="wmean")
    examples = [dataclasses.replace(e, positives=e.positives[:1]) for e in examples]
    assert loss(positives="mean") == pytest.approx(only_first, rel=1e-5)


def test_a_study_runs_once_each_and_resumes(tmp_path, monkeypatch, capsys):
    phases = ("symbol_pairs", 2, 0), ("lookup_pairs", 1, 0)
    monkeypatch.setattr(runs, "RECIPES", {family: students.Recipe(family, phases) for family in students.FAMILIES})
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


def test_a_p_value_needs_five_seeds_and_holm_counts_the_others(tmp_path, capsys):
    rng = random.Random(0)

    def bits(share):
        return runs.to_hex([rng.random() < share for _ in range(1000)])

    for arm, share, seeds in (("sft-all", 0.4, 6), ("soft checks", 0.7, 6), ("soft", 0.7, 4)):
        for seed in range(seeds):
            row = runs.Case("confirm", "mix", "decoder", arm, seed)._asdict()
            study.append_row(
                tmp_path / "runs.csv",
                row
                | {"labels": bits(0.5), "sounds": bits(share), "accuracy": 0.5, "sound": share}
                | dict.fromkeys(("faithful", "nll_sound", "entropy", "cpu_s"), 0.1),
            )
    assert study.main(["--results", str(tmp_path / "runs.csv"), "--stage", "confirm", "--table"]) == 0
    told = {tuple(line.split(" | ")[2:5]): line for line in capsys.readouterr().out.splitlines() if "| mix |" in line}
    assert told["soft", "sft-all", "sound"].endswith("| 4 | - |")
    assert told["soft checks", "sft-all", "sound"].endswith("| <1e-06 |")
    assert told["soft checks", "sft-all", "accuracy"].endswith("| 1 |")
    options = ["--results", str(tmp_path / "runs.csv"), "--stage", "confirm", "--table"]
    assert study.main([*options, "--fewest-seeds", "5"]) == 0
    printed = capsys.readouterr().out
    assert "\n| soft checks | 6 |" in printed and "\n| soft | 4 |" not in printed
    assert {line for line in printed.splitlines() if "| mix |" in line} == set(told.values())  # Holm counts every arm
    assert study.main([*options, "--fewest-seeds", "7"]) == 0
    printed = capsys.readouterr().out
    assert "## confirm" not in printed and told["soft", "sft-all", "sound"] in printed

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- confirm -->\nold\n<!-- end confirm -->\nafter\n")
    for _ in range(2):
        assert study.main([*options, "--update", str(page)]) == 0
        printed = capsys.readouterr().out
        assert page.read_text() == f"before\n<!-- confirm -->\n\n{printed}\n<!-- end confirm -->\nafter\n"
    page.write_text("no marks\n")
    assert study.main([*options, "--update", str(page)]) == 2 and page.read_text() == "no marks\n"


@pytest.mark.parametrize("mean", [0.5, 5.0, 1e3, 1e7])
def test_a_p_value_far_out_is_as_exact(mean):
    """Three seeds and one question, spread 1: two degrees of freedom, whose tail is 1 - t / sqrt(t^2 + 2)."""
    t = mean * 3**0.5
    root = (t * t + 2) ** 0.5
    expected = 2 / (root * (root + t))  # the same without a difference of what is almost equal
    assert tables.p_value(np.array([[mean - 1], [mean], [mean + 1]])) == pytest.approx(expected, rel=1e-3)


def test_runs_of_two_machines_are_no_pair(tmp_path, monkeypatch, capsys):
    """Each pretrains its own student: of seeds 0 to 5 the last was made elsewhere for one of the arms."""
    monkeypatch.setattr(runs.from_hex, "__defaults__", (8,))
    path = tmp_path / "runs.csv"
    for arm, right in (("sft-all", "0f"), ("soft", "ff")):
        for seed in range(6):
            row = runs.Case("confirm", "mix", "decoder", arm, seed)._asdict()
            figures = dict.fromkeys(("accuracy", "sound", "faithful", "nll_sound", "entropy", "cpu_s"), 0.1)
            study.append_row(path, row | figures | {"labels": right, "sounds": right})
    lines = path.read_text().splitlines(keepends=True)
    device = next(csv.DictReader(lines))["device"]
    path.write_text("".join([*lines[:-1], lines[-1].replace(device, "another")]))
    assert study.main(["--results", str(path), "--stage", "confirm", "--table"]) == 0
    compared = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mix |")]
    assert len(compared) == 2 and all(line.split(" | ")[-2] == "5" for line in compared)


def test_pairs_of_the_recorded_runs_are_of_one_machine():
    for stage in runs.STAGES:
        for arms in tables.read_runs(study.RESULTS, stage).values():
            for rows, others in itertools.combinations(arms.values(), 2):
                assert tables.paired_seeds(rows, others) == sorted(set(rows) & set(others))


def test_arms_named_for_the_paper_and_the_default_are_those():
    """`negative_lag` and what bounds the work are the study's own for every arm."""

    def resolved(arm):
        return TrainConfig.from_dict({**COMMON, **ARMS[arm].options}).resolved()

    paper, default, printed = resolved("qcrd-paper"), resolved("soft checks"), TrainConfig(paper=True).resolved()
    others = ("beta", "delta", "agreeing_negatives", "negative_temperature")
    for name in (*PAPER, *PAPER_SELECTS, *QUALITY_OPTIONS, *others):
        assert getattr(paper, name) == getattr(printed, name), name
    plain = TrainConfig().resolved()
    assert default.selects[0] == plain.selects[0] == "softmin"
    assert default.qualities[0] == plain.qualities[0] == "checks"
    assert default.negative_source == plain.negative_source == "none" and default.method == plain.method


def test_on_policy_arms_train_on_as_many_tokens(tmp_path, monkeypatch):
    """Cold, and warm: half of the tokens are of sft-all, whose student the other run begins with."""
    phases = ("symbol_pairs", 2, 0), ("lookup_pairs", 1, 0)
    monkeypatch.setattr(runs, "RECIPES", {"decoder": students.Recipe("decoder", phases)})
    monkeypatch.setattr(runs, "TEST_QUESTIONS", 12)
    monkeypatch.setattr(mentors, "QUESTIONS", 16)
    monkeypatch.setattr(mentors, "OPTIONS", {**mentors.OPTIONS, "num_train_epochs": 1})
    begun, trained = [], runs.train
    monkeypatch.setattr(runs, "train", lambda config, **options: begun.append(config) or trained(config, **options))

    def run(arm):
        begun.clear()
        return runs.run_case(runs.Case("screen", "mix", "decoder", arm, 0, epochs=4, questions=16), tmp_path / "cache")

    tokens = pytest.approx(run("sft-all")["student_tokens"], rel=0.15)
    assert len(begun) == 1
    for name in ("opd mentor", "gkd mentor"):
        row, (first, second) = run(f"sft-all + {name}"), begun
        assert (first.method, second.method) == ("sft-all", name.split()[0])
        assert second.student.startswith(first.output_dir) and first.num_train_epochs == 2
        assert second.learning_rate / first.learning_rate == pytest.approx(0.2 if second.method == "opd" else 1)
        assert row["steps"] > 4 and row["student_tokens"] == tokens
    counted = runs._epoch_tokens
    monkeypatch.setattr(runs, "_epoch_tokens", lambda *args: (counted(*args)[0], counted(*args)[1] / 4))
    assert run("sdft")["student_tokens"] == tokens  # of four times the steps, those that the tokens are enough for
