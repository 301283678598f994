"""The table of methods: a row for each name, weights by hand."""

from __future__ import annotations

import dataclasses
import types

import pytest

from qcrd_fast import config
from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.train.methods import METHODS, Method, label_kind, samples_student
from qcrd_fast.train.trainer import train


def test_every_method_has_a_row():
    assert list(METHODS) == list(config.METHODS)


@pytest.mark.parametrize(
    "method, positives, minority, expected",
    [
        ("dss", 3, 2, ([0.25], [])),
        ("sft-all", 2, 2, ([0.125, 0.125], [])),
        ("sft-all", 0, 2, ([], [])),
        ("redi", 1, 2, ([0.25], [0.125, 0.125])),
        ("redi", 2, 0, ([0.125, 0.125], [])),
        ("finetune", 3, 2, ([], [])),
    ],
)
def test_weights_of_a_question_among_four(method, positives, minority, expected):
    assert METHODS[method].weights(1 / 4, positives, minority) == expected


def test_qcrd_samples_its_student_where_negatives_are_its_own_and_on_policy_methods_always():
    sampling = [m for m in METHODS if samples_student(TrainConfig(method=m, negative_source="lagged"))]
    assert sampling == ["qcrd", "opd", "sdft", "gkd"]
    assert [m for m in METHODS if samples_student(TrainConfig(method=m))] == ["opd", "sdft", "gkd"]
    assert not samples_student(TrainConfig(negative_source="minority")) and not samples_student(TrainConfig())


def test_the_label_is_the_methods_own_unless_told():
    assert label_kind(TrainConfig(method="finetune")) == "gold" and label_kind(TrainConfig()) is None
    assert label_kind(TrainConfig(method="finetune", label="majority")) == "majority"


def test_a_method_is_added_in_two_files(monkeypatch, rows_file, t5_folder, tmp_path):
    """A name in `config` and a row of `train.methods`; `train` then runs it, here with the weights of `sft-all`."""
    (field,) = [f for f in dataclasses.fields(TrainConfig) if f.name == "method"]
    choices = (*config.METHODS, "twice")
    monkeypatch.setattr(field, "metadata", types.MappingProxyType({**field.metadata, "choices": choices}))

    def all_positives(share, positives, minority):
        return [share / positives] * positives, []

    monkeypatch.setitem(METHODS, "twice", Method(all_positives))

    def loss(method):
        options = TrainConfig(
            data=str(rows_file), student=str(t5_folder), output_dir=str(tmp_path / method), method=method, max_steps=1,
            per_device_train_batch_size=2, device="cpu", seed=1,
        )  # fmt: skip
        train(options)
        return (tmp_path / method / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0]

    assert loss("twice") == loss("sft-all")
    with pytest.raises(InputError, match="--method is one of"):
        TrainConfig(method="thrice")
