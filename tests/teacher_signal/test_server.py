"""A server that scores prompts: the numbers are those of the local model, and what does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch

from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.teacher_signal.local import LocalTeacher
from qcrd_fast.teacher_signal.server import ServerScorer
from qcrd_fast.train.trainer import train
from tests.support.fake_teacher import serving, status
from tests.support.prompt_server import scoring
from tests.support.short_runs import metrics, settings

TARGETS = ["First 3 + 4 = 7.", "Then 9 - 2 = 7. So 7.", "5"]


@pytest.fixture(scope="module")
def model(llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    student.model.eval()
    return student


def asked(model):
    sources = [model.source_ids("explain: ", f"Ann has {i} apples?") for i in range(3)]
    return sources, [model.target_ids(t) for t in TARGETS]


def test_its_log_probs_are_those_of_the_model(model):
    sources, targets = asked(model)
    local = LocalTeacher(model)
    own, top = local.top(sources, targets, [0, 1, 2], 4)
    with serving(scoring(model)) as server:
        server.plan = [status(503), status(429, retry_after="0")]  # neither of them is the end
        found = ServerScorer(server.url, "only", model.tokenizer).score(sources, targets, 4)
        bodies = [s.body for s in server.seen]
    assert all(
        b["prompt"] in [s + t for s, t in zip(sources, targets, strict=True)] and b["max_tokens"] == 1 for b in bodies
    )
    got = torch.tensor([x for each in found for x in each.logprob])
    assert (got - own).abs().max() < 1e-5 and (local.logprob(sources, targets, [0, 1, 2]) - own).abs().max() < 1e-5
    assert [ids for each in found for ids in each.ids] == top.ids_TK.tolist()
    assert (torch.tensor([x for each in found for x in each.top]) - top.logprob_TK).abs().max() < 1e-5


def test_without_likeliest_tokens_and_without_a_name(model):
    sources, targets = asked(model)
    with serving(scoring(model)) as server:
        scorer = ServerScorer(server.url, "", model.tokenizer)
        found = scorer.score(sources, targets)
    assert scorer.model == "only" and [len(each.logprob) for each in found] == [len(t) for t in targets]
    assert all(ids == [] for each in found for ids in each.ids)


def test_a_server_with_another_tokenizer_is_refused(model):
    refused = pytest.raises(InputError, match="another tokenizer than the student")
    with serving(scoring(model, decode=lambda id: f"other{id}")) as server, refused:
        ServerScorer(server.url, "only", model.tokenizer).score(*asked(model))


def test_a_server_that_scores_no_prompts_is_told_apart(model):
    with (
        serving(scoring(model, places=False)) as server,
        pytest.raises(InputError, match=r"does not score prompts.*collect"),
    ):
        ServerScorer(server.url, "only", model.tokenizer).score(*asked(model))


def test_refusals_and_silence(model):
    with serving(status(401)) as server, pytest.raises(RunError, match="401"):
        ServerScorer(server.url, "only", model.tokenizer).score(*asked(model))
    with serving(status(500)) as server, pytest.raises(RunError, match="500"):
        ServerScorer(server.url, "only", model.tokenizer, deadline_s=0.2).score(*asked(model))
    with pytest.raises(InputError, match="not a URL"):
        ServerScorer("http://", "only", model.tokenizer)


def test_opd_from_a_server_is_opd_from_the_model(model, llama_folder, rows_file, tmp_path):
    changes = dict(method="opd", quality=None, scheme=None, negative_source=None, max_steps=2, validation_fraction=0.0)
    with serving(scoring(model)) as server:
        train(settings(rows_file, llama_folder, tmp_path / "a", teacher=server.url, **changes))
    train(settings(rows_file, llama_folder, tmp_path / "b", teacher=str(llama_folder), **changes))
    a, b = metrics(tmp_path / "a")[-1], metrics(tmp_path / "b")[-1]
    assert a["teacher_kl"] == pytest.approx(b["teacher_kl"], abs=1e-5) and b["teacher_kl"] != 0


def test_a_t5_student_has_no_prompt_to_score(t5_folder, rows_file, tmp_path):
    with pytest.raises(InputError, match="decoder-only"):
        train(settings(rows_file, t5_folder, tmp_path / "a", method="opd", teacher="http://127.0.0.1:1/v1"))
