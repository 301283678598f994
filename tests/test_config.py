"""Options are checked where they are made, and the docs list exactly them."""

import pytest

from qcrd_fast.config import TrainConfig, options_markdown
from qcrd_fast.errors import InputError
from tests.support.paths import ROOT


def test_docs_list_the_options_as_they_are():
    written = ROOT / "docs" / "options.md"
    assert written.read_text(encoding="utf-8").endswith("\n\n" + options_markdown())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"learning-rat": 1}, "unknown option 'learning-rat'; did you mean 'learning_rate'"),
        ({"learning-rate": 1e-3, "learning_rate": 1e-4}, "given twice"),
        ({"model-name-or-path": "a", "student": "b"}, "given twice"),
        ({"scheme": "minmx"}, "did you mean 'minmax'"),
        ({"beta": -1}, "--beta must be at least 0"),
        ({"learning_rate": 0}, "--learning-rate must be above 0"),
        ({"learning_rate": float("nan")}, "must be finite"),
        ({"max_steps": 0}, "--max-steps must be positive"),
        ({"max_steps": 2.5}, "--max-steps expects int, got 2.5"),
        ({"bf16": "yes"}, "--bf16 expects bool, got 'yes'"),
        ({"warmup_ratio": 1.5}, "at most 1"),
        ({"seed": True}, "--seed expects int, got True"),
        ({"method": None}, "--method needs a value"),
    ],
)
def test_bad_values_are_refused_with_the_option_and_the_value(values, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        TrainConfig.from_dict(values)


def test_yaml_floats_and_aliases():
    config = TrainConfig.from_dict(
        {"learning-rate": "5e-4", "model-name-or-path": "s", "resume-from-checkpoint": "auto"}
    )
    assert (config.learning_rate, config.student, config.resume) == (5e-4, "s", "auto")


def test_options_without_a_use_are_known():
    assert TrainConfig(beta=0.3, negative_lag=2, negative_source="lagged").unused() == []
    assert TrainConfig(beta=0.3, negative_lag=2, discriminator_folds=2).unused() == [
        "--beta",
        "--negative-lag",
        "--discriminator-folds",
    ]
    assert TrainConfig(beta=0.3, negative_lag=2, paper=True).unused() == []
    assert TrainConfig(redi_warmup=0.2, domain_weight_steps=7, alpha_d=0.3).unused() == [
        "--domain-weight-steps", "--alpha-d", "--redi-warmup",
    ]  # fmt: skip
    files = TrainConfig(method="mentor-kd", teacher_logprobs="x", top_logprobs=3, kd_lambda=0.5)
    assert files.unused() == ["--top-logprobs"]
    given = dict(domain_weights="ddk-like", domain_weight_steps=7)
    assert TrainConfig(method="redi", redi_warmup=0.2, **given).unused() == []
    assert TrainConfig(paper=True, alpha_d=0.3).unused() == []
    assert TrainConfig(method="dss", beta=0.3, negative_lag=2, seed=3).unused() == ["--beta", "--negative-lag"]


def test_selections_follow_the_scheme_unless_set_apart():
    assert TrainConfig().selects == ("softmin", "max")
    assert TrainConfig(scheme="minmax").selects == TrainConfig(paper=True).selects == ("min", "max")
    assert TrainConfig(scheme="wmean").selects == ("wmean", "wmean")
    assert TrainConfig(negative_select="max-active").selects == ("softmin", "max-active")
