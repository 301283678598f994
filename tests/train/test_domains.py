"""Weights of domains and rows: DDK's equations on a toy, what they do to a loss, a run that is stopped and resumed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.teacher_signal.local import LocalTeacher
from qcrd_fast.train.domains import DomainWeights, factors, few_of_each, first_weights, next_weights, teacher_losses
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.teaching import ModelTeaching
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.device import make_autocast
from tests.support.short_runs import metrics, same, settings, weights

STUDENT, TEACHER = {"a": 1.0, "b": 2.0, "c": 0.4}, {"a": 0.5, "b": 0.8, "c": 1.0}


def test_weights_follow_the_equations_of_ddk():
    ratios = {"a": 2.0, "b": 2.5, "c": 0.4}
    total = sum(math.exp(ratio) for ratio in ratios.values())
    r0 = first_weights(STUDENT, TEACHER)
    assert r0 == pytest.approx({d: math.exp(ratio) / total for d, ratio in ratios.items()}, abs=1e-12)
    psi = {d: r0[d] * math.exp(ratio) for d, ratio in ratios.items()}
    expected = {d: 0.5 * psi[d] / sum(psi.values()) + 0.5 / 3 for d in psi}
    r1 = next_weights(r0, STUDENT, TEACHER)
    assert r1 == pytest.approx(expected, abs=1e-12)
    assert sum(r1.values()) == pytest.approx(1, abs=1e-12)
    assert next_weights(r0, STUDENT, TEACHER, alpha=0.0) == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-12)
    assert factors({"a": 0.5, "b": 0.5}, {"a": 1, "b": 3}) == {"a": 2.0, "b": pytest.approx(2 / 3)}


def test_a_huge_ratio_overflows_nothing_and_leaves_no_domain_without_weight():
    r = next_weights({"a": 0.5, "b": 0.5}, {"a": 1e6, "b": 0.0}, {"a": 1e-3, "b": 1.0})
    assert r["b"] == pytest.approx(0.5 * math.exp(-10) / (1 + math.exp(-10)) + 0.25, abs=1e-12)


def rows(domain: str, majorities: str) -> list[Question]:
    return [
        Question(f"{domain}{i}", "?", gold="1", majority=m, task="number", domain=domain)
        for i, m in enumerate(majorities)
    ]


def test_the_teachers_loss_is_of_its_error():
    found = teacher_losses([*rows("x", "1121"), *rows("y", "11")])
    assert found == pytest.approx({"x": -math.log(1 - 1.5 / 5), "y": -math.log(1 - 0.5 / 3)}, abs=1e-12)
    with pytest.raises(InputError, match="'z' has none"):
        teacher_losses([*rows("x", "1"), Question("z", "?", domain="z")])
    with pytest.raises(InputError, match="one domain, 'x'"):
        DomainWeights(rows("x", "12"), "ddk", 1, dict)


def test_weights_change_every_k_steps_and_go_on_from_their_state():
    losses = iter([STUDENT, {"a": 0.1, "b": 0.1, "c": 3.0}])
    of = [*rows("a", "1"), *rows("b", "11"), *rows("c", "1")]
    domains = DomainWeights(of, "ddk-like", 3, lambda: next(losses))
    first = domains.factors(0)
    assert domains.factors(1) == domains.factors(2) == first
    state = json.loads(json.dumps(domains.state()))
    later = domains.factors(3)
    assert later["c"] > first["c"]
    again = DomainWeights(of, "ddk-like", 3, lambda: {"a": 0.1, "b": 0.1, "c": 3.0})
    again.restore(state)
    assert again.factors(2) == first and again.factors(3) == later
    assert sum(later[d] * n for d, n in (("a", 1), ("b", 2), ("c", 1))) == pytest.approx(4)


def test_few_of_each_does_not_depend_on_the_order():
    of = [*rows("a", "11111"), *rows("b", "1")]
    assert few_of_each(of, 2) == few_of_each(of[::-1], 2)
    assert {domain: len(some) for domain, some in few_of_each(of, 2).items()} == {"a": 2, "b": 1}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["qcrd", "sft-all", "finetune"])
def test_a_question_that_weighs_twice_counts_as_two(method, llama_folder, rows_file):
    config = TrainConfig(method=method, reasoning_task=True, quality="none" if method == "qcrd" else None)
    student = Student.load(str(llama_folder), PromptSettings())
    a, b, _ = load_questions(rows_file).questions[:3]

    def gradients(*questions):
        batch = make_examples(questions, student, config)
        student.model.zero_grad(set_to_none=True)
        Objective(student, config, None, make_autocast(student.device, False)).step(MicroBatch(batch, {}, 3))
        return {name: p.grad.clone() for name, p in student.model.named_parameters()}

    twice = gradients(dataclasses.replace(a, weight=2.0), dataclasses.replace(b, weight=0.0))
    both = gradients(a, dataclasses.replace(a, id="again"))
    for name, gradient in twice.items():
        torch.testing.assert_close(gradient, both[name], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["opd", "sdft", "gkd"])
def test_what_the_student_says_counts_as_its_question_does(method, llama_folder, rows_file):
    """Gradients are linear in the weights: 2 for one question and 0 for the other are twice those of 1 and 0."""
    config = TrainConfig(method=method, alpha_pred=0.0, gkd_lambda=1.0)
    student = Student.load(str(llama_folder), PromptSettings())
    teacher = LocalTeacher(Student.load(str(llama_folder), PromptSettings()))
    with torch.no_grad():
        for p in teacher.model.model.parameters():
            p.mul_(1.1)
    a, b = load_questions(rows_file).questions[:2]
    said = {q.id: Negative(student.target_ids(text), text) for q, text in ((a, "So 5 are left."), (b, "It is 4."))}

    def gradients(*weights):
        questions = [dataclasses.replace(q, weight=w) for q, w in zip((a, b), weights, strict=True)]
        autocast = make_autocast(student.device, False)
        objective = Objective(student, config, None, autocast, teaching=ModelTeaching(teacher, config))
        tokens = sum(len(each.tokens) for each in said.values())
        student.model.zero_grad(set_to_none=True)
        objective.step(MicroBatch(make_examples(questions, student, config), said, 2, sampled_tokens=tokens))
        return torch.cat([p.grad.flatten() for p in student.model.parameters()])

    one, other, both = gradients(2.0, 0.0), gradients(0.0, 1.0), gradients(2.0, 1.0)
    assert min(g.abs().max() for g in (one, other)) > 1e-6
    torch.testing.assert_close(one, 2 * gradients(1.0, 0.0), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(both, one + other, rtol=1e-9, atol=1e-14)


def test_a_loss_that_takes_no_weights_says_so(llama_folder, rows_file):
    student = Student.load(str(llama_folder), PromptSettings())
    questions = [dataclasses.replace(q, weight=2.0) for q in load_questions(rows_file).questions[:2]]
    with pytest.raises(InputError, match="--forward joint cannot weigh"):
        make_examples(questions, student, TrainConfig(forward="joint"))
    with pytest.raises(InputError, match="weight of all 2 questions is 0"):
        make_examples([dataclasses.replace(q, weight=0.0) for q in questions], student, TrainConfig())
    with pytest.raises(InputError, match="--mentor-kd-literal cannot weigh"):
        make_examples(questions, student, TrainConfig(method="mentor-kd", teacher="x", mentor_kd_literal=True))
    with pytest.raises(InputError, match="--method mi cannot weigh"):
        make_examples(questions[:0], student, TrainConfig(method="mi", domain_weights="ddk"))


def test_a_run_weighs_its_domains_and_resumes_to_the_bit(llama_folder, rows_file, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"domain": "ab"[i % 3 == 0]}) + "\n" for i, row in enumerate(lines)))
    options = dict(
        method="sft-all",
        domain_weights="ddk-like",
        domain_weight_steps=2,
        negative_source=None,
        quality=None,
        scheme=None,
    )

    def config(name, **changes):
        return settings(path, llama_folder, tmp_path / name, **options, **changes)

    results = train(config("whole"))
    whole = metrics(tmp_path / "whole")
    found = [line["domain_weights"] for line in whole if "domain_weights" in line]
    assert len(found) == 6 and found[0] == found[1] != found[2] and results["domain_weights"] == found[-1]
    assert all(sum(r.values()) == pytest.approx(1) and set(r) == {"a", "b"} for r in found)
    train(config("broken"))
    for left in ("eval_results.json", "predictions.jsonl", "final"):
        (tmp_path / "broken" / left).unlink()
    last = next(path for path in (tmp_path / "broken").glob("checkpoint-6"))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()  # as if it had been killed behind step 3
    train(config("broken", resume="auto"))
    assert metrics(tmp_path / "broken") == whole
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
