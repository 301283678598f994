"""Runs whose discriminator is refused, kept, or was trained by an earlier version: the vote in its place, exact
resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from qcrd_fast.config import LEGACY, TrainConfig
from qcrd_fast.discriminator.cross_fit import CrossFitTrainer
from qcrd_fast.errors import InputError
from qcrd_fast.score import load_discriminator
from qcrd_fast.train.judging import DiscriminatorJudge
from qcrd_fast.train.trainer import Trainer, train
from qcrd_fast.utils.files import sha256, write_json
from tests.support import short_runs
from tests.support.short_runs import metrics, same, weights

UNSET = dict(discriminator_folds=None, discriminator_min_auc=None)


class Killed(BaseException):
    pass


def settings(*args, **changes) -> TrainConfig:
    """Without validation, which takes a good part of a short run."""
    return short_runs.settings(*args, **({"validation_fraction": 0.0} | changes))


def killed_and_resumed(monkeypatch, config: TrainConfig, at: int = 4, between=lambda run: None, **changes) -> Path:
    """A run that dies before step `at + 1` and is resumed with `changes`; `between` is given its folder in between."""
    real, run = Trainer._train_step, Path(str(config.output_dir))

    def dies(self):
        if self.step == at:
            raise Killed
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", dies)
        with pytest.raises(Killed):
            train(config)
    between(run)
    train(dataclasses.replace(config, resume="auto", **changes))
    return run


def assert_equal(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole) and same(weights(run), weights(whole))
    assert json.loads((run / "eval_results.json").read_text()) == json.loads((whole / "eval_results.json").read_text())
    states = [json.loads((folder / "checkpoint-6" / "state.json").read_text()) for folder in (run, whole)]
    assert states[0].get("discriminator_check") == states[1].get("discriminator_check")


def unchecked(run: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if not k.startswith("discriminator")} for m in metrics(run)]


def check_of(run: Path) -> dict:
    return json.loads((run / "checkpoint-6" / "state.json").read_text())["discriminator_check"]


def test_a_discriminator_that_cannot_tell_is_refused(rows_file, t5_folder, tmp_path, monkeypatch, caplog):
    """By default: the run is the one of `--quality vote`, and says why; killed and resumed it is the same."""
    whole = tmp_path / "whole"
    options = dict(discriminator_min_auc=None, discriminator_pretrain_steps=1)
    with caplog.at_level("WARNING", "qcrd_fast"):
        results = train(settings(rows_file, t5_folder, whole, **options))
    told = check_of(whole)
    assert (
        told["refused"]
        and (told["auc_low"] is None or told["auc_low"] < 0.6)
        and results["discriminator_refused"] is True
    )
    assert results["discriminator_auc"] == told["auc"]
    (message,) = [r.getMessage() for r in caplog.records if "rejected" in r.getMessage()]
    assert f"lower bound of {told['auc_low']:.3f} (--discriminator-min-auc 0.6)" in message and "the vote" in message
    assert message in (whole / "run.log").read_text()
    train(settings(rows_file, t5_folder, tmp_path / "vote", quality="vote"))
    assert unchecked(whole) == unchecked(tmp_path / "vote")
    assert metrics(whole)[0]["discriminator_auc_low"] == told["auc_low"] and metrics(whole)[0]["loss_d"] is None
    assert same(weights(whole), weights(tmp_path / "vote"))
    assert not list(whole.rglob("discriminator.safetensors"))
    with pytest.raises(InputError, match="rejected, since its held-out AUC has a lower bound of"):
        load_discriminator(str(whole))
    assert_equal(killed_and_resumed(monkeypatch, settings(rows_file, t5_folder, tmp_path / "run", **options)), whole)


def test_one_that_is_refused_later(rows_file, llama_folder, tmp_path, monkeypatch):
    """In use at first, refused after the update of the last iteration; killed within that iteration and before it."""
    real, judged = CrossFitTrainer.check, []

    def check(self, *args):
        return dataclasses.replace(real(self, *args), refused=self.trainers[0].alpha_d == pytest.approx(0.45))

    def spy(self, cases, real=DiscriminatorJudge.scores):
        judged.append(len(cases))
        return real(self, cases)

    monkeypatch.setattr(CrossFitTrainer, "check", check)
    monkeypatch.setattr(DiscriminatorJudge, "scores", spy)
    whole = tmp_path / "whole"
    train(settings(rows_file, llama_folder, whole))
    assert len(judged) == 4 and check_of(whole)["refused"]  # two iterations of two steps
    assert [m["loss_d"] is None for m in metrics(whole) if "loss_d" in m] == [False] * 4 + [True] * 2
    assert not (whole / "checkpoint-6" / "discriminator.safetensors").exists()
    assert (whole / "checkpoint-3" / "discriminator.safetensors").exists()
    for at in (3, 5):
        assert_equal(killed_and_resumed(monkeypatch, settings(rows_file, llama_folder, tmp_path / str(at)), at), whole)


@pytest.mark.parametrize("folds", [0, 3])
def test_one_in_use_is_resumed_exactly(folds, rows_file, t5_folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train(settings(rows_file, t5_folder, whole, discriminator_folds=folds))
    assert not check_of(whole)["refused"] and metrics(whole)[0]["loss_d"] is not None
    run = killed_and_resumed(monkeypatch, settings(rows_file, t5_folder, tmp_path / "run", discriminator_folds=folds))
    assert_equal(run, whole)
    names = [(folder / "checkpoint-6" / "discriminator.safetensors").read_bytes() for folder in (run, whole)]
    assert names[0] == names[1]


def without_new_keys(run: Path) -> None:
    """Make a run folder what it was before there were these options."""
    new = {*LEGACY, "paper", "quality", "positive_quality", "negative_quality", "agreeing_negatives"}

    def older(config):
        return {
            k: None if k in ("positive_select", "negative_select") else v for k, v in config.items() if k not in new
        }

    path = run / "config.resolved.yaml"
    path.write_text(yaml.safe_dump(older(yaml.safe_load(path.read_text())), sort_keys=False))
    for state in run.glob("checkpoint-*/state.json"):
        told = json.loads(state.read_text())
        told.pop("discriminator_check", None)
        write_json(state, told | {"config": older(told["config"])})
        manifest = json.loads((state.parent / "MANIFEST.json").read_text())
        write_json(state.parent / "MANIFEST.json", {"files": manifest["files"] | {"state.json": sha256(state)}})


def test_a_run_of_an_earlier_version_is_resumed_as_it_was_trained(rows_file, t5_folder, tmp_path, monkeypatch):
    """Eq. 2 with corrupted words, in-sample, never refused: what was the default then, without options now."""
    whole = tmp_path / "whole"
    train(settings(rows_file, t5_folder, whole, paper=True, **UNSET))
    config = settings(rows_file, t5_folder, tmp_path / "run", paper=True, **UNSET)
    unsaid = dict(paper=False, scheme=None, negative_source=None)
    run = killed_and_resumed(monkeypatch, config, between=without_new_keys, **unsaid)
    assert same(weights(run), weights(whole))
    assert unchecked(run) == unchecked(whole)  # whose checkpoint knew of no held-out AUC
    kept = yaml.safe_load((run / "config.resolved.yaml").read_text())
    assert (
        kept["discriminator_loss"] == "ratio"
        and kept["discriminator_folds"] == 0
        and kept["quality"] == "discriminator"
    )
    assert (kept["scheme"], kept["positive_select"], kept["negative_source"]) == ("minmax", None, "lagged")
    with pytest.raises(InputError, match="began with --discriminator-folds 0, now it is 3"):
        train(dataclasses.replace(config, paper=False, resume="auto", discriminator_folds=3))


def test_paper_sets_defaults(rows_file, t5_folder, tmp_path):
    wanted = LEGACY | {
        "discriminator_loss": "ratio", "discriminator_augment": "mask,replace", "quality": "discriminator",
        "positive_select": "min", "negative_select": "max", "paper": True, "negative_source": "lagged",
    }  # fmt: skip
    config = TrainConfig(paper=True)
    assert wanted.items() <= config.resolved().to_dict().items() and config.augmentations == ("mask", "replace")
    given = TrainConfig.from_dict(
        {"paper": True, "discriminator-loss": "bce", "discriminator_folds": 2, "scheme": "mean"}
    )
    kept = given.resolved().to_dict()
    assert (kept["discriminator_loss"], kept["discriminator_folds"], given.resolved().selects) == (
        "bce",
        2,
        ("mean", "mean"),
    )
    assert kept["discriminator_augment"] == "mask,replace"
    assert TrainConfig(paper=True, discriminator="none").resolved().quality == "none"
    assert TrainConfig(paper=True, method="dss").unused() == []
    before = config.resolved().to_dict()
    assert wanted.items() <= TrainConfig().resolved(before).to_dict().items()  # a resume need not say it again
    ours = TrainConfig().resolved()
    assert (ours.discriminator_loss, ours.discriminator_augment, ours.discriminator_folds) == ("bce-all", "none", 3)
    assert (ours.selects, ours.negative_source, ours.qualities) == (("softmin", "max"), "none", ("checks", "vote"))
    assert not ours.paper and ours.resolved() == ours == TrainConfig().resolved(ours.to_dict())


def test_only_samples_that_are_wrong_are_negatives_of_the_updates(rows_file, t5_folder, tmp_path, monkeypatch):
    """Neither those that agree with the majority nor those that were cut before their end; as printed, all are."""
    from qcrd_fast.train import student_answers

    seen: dict[str, list] = {}
    real_case, real_update = student_answers.student_case, CrossFitTrainer.update

    def case(question, text, *, cut=False):
        kind = int(question.id[-1], 36) % 3  # agrees, disagrees, cut
        found = real_case(question, text, cut=cut)
        rationale = dataclasses.replace(found.rationale, truncated=kind == 2)
        return dataclasses.replace(
            found, rationale=rationale, agrees=[True, False, None][kind], votes=[2, 0, None][kind]
        )

    def update(self, questions, lagged, iteration, on_step=None):
        seen[self.config.effective("discriminator_agreeing")] = sorted(lagged)
        return real_update(self, questions, lagged, iteration, on_step)

    monkeypatch.setattr(student_answers, "student_case", case)
    monkeypatch.setattr(CrossFitTrainer, "update", update)
    for kind in ("drop", "negative"):
        train(
            settings(
                rows_file, t5_folder, tmp_path / kind, discriminator_agreeing=kind, max_steps=3, validation_fraction=0.0
            )
        )
    assert seen["drop"] and set(seen["drop"]) == {i for i in seen["negative"] if int(i[-1], 36) % 3 == 1}
    assert len(seen["negative"]) > 2 * len(seen["drop"])
