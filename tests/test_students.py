"""The student's packed hidden states score exactly what the model itself would."""

import json
import shutil

import pytest
import torch

from qcrd_fast.errors import InputError
from qcrd_fast.ops import linear_logprob
from qcrd_fast.students import EXPLAIN, PromptSettings, Student, length_batches


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request):
    student = Student.load(str(request.getfixturevalue(request.param)), PromptSettings())
    student.model.eval()
    return student


QUESTIONS = ["Ann has 3 apples. Ann finds 4 apples, then loses 2 apples.", "Ben has 7 pens."]
RATIONALES = ["First 3 + 4 = 7 apples. Then 7 - 2 = 5.", "7", "Take away 2: 7 - 2 = 5."]
SOURCE_OF = [0, 1, 0]


def logprobs(student, sources, targets, source_of, **kwargs):
    packed = student.hidden(sources, targets, source_of, **kwargs)
    head = student.head
    out = linear_logprob(packed.hidden, head.weight, packed.target, bias=head.bias, scale=head.scale, softcap=head.softcap)
    return out, packed.segment


def test_scores_equal_the_models_own_loss(student):
    sources = [student.source_ids(EXPLAIN, q) for q in QUESTIONS]
    targets = [student.target_ids(r) for r in RATIONALES]
    logprob, segment = logprobs(student, sources, targets, SOURCE_OF)
    for i, (target, q) in enumerate(zip(targets, SOURCE_OF, strict=True)):
        if student.is_encoder_decoder:
            loss = student.model(input_ids=torch.tensor([sources[q]]), labels=torch.tensor([target])).loss
        else:  # the prompt's tokens carry no loss
            ids = torch.tensor([sources[q] + target])
            labels = torch.tensor([[-100] * len(sources[q]) + target])
            loss = student.model(input_ids=ids, labels=labels).loss
        assert -logprob[segment == i].mean().item() == pytest.approx(loss.item(), abs=2e-6)


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_batching_by_length_changes_nothing(student, max_tokens):
    sources = [student.source_ids(EXPLAIN, q) for q in QUESTIONS]
    targets = [student.target_ids(r) for r in RATIONALES]
    expected = student.decode(student.encode(sources), targets, SOURCE_OF)
    got = student.hidden(sources, targets, SOURCE_OF, max_tokens=max_tokens)
    torch.testing.assert_close(got.hidden, expected.hidden, atol=1e-5, rtol=1e-5)
    assert got.target.tolist() == expected.target.tolist() and got.segment.tolist() == expected.segment.tolist()


def test_length_batches_are_a_partition_within_the_limit():
    lengths = [5, 80, 7, 7, 6, 300, 40, 41]
    batches = list(length_batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= 100
        assert 2 * min(lengths[i] for i in batch) >= longest


def test_a_target_ends_in_eos_unless_it_was_cut(student):
    eos = student.tokenizer.eos_token_id
    assert student.target_ids("7 - 2 = 5")[-1] == eos
    student.prompts = PromptSettings(max_target_length=4)
    assert len(student.target_ids("7 - 2 = 5")) == 4 and eos not in student.target_ids("7 - 2 = 5")
    assert student.target_ids("7 - 2")[-1] == eos


def test_prompt_template_from_a_file(tmp_path, student):
    path = tmp_path / "template.txt"
    path.write_text("Ann {prompt} Ben")
    student.prompts = PromptSettings.from_option(str(path), 64, 64)
    text = student.text(student.source_ids(EXPLAIN, "7"))
    assert text.startswith("Ann explain: 7") and text.endswith("Ben")
    path.write_text("no place for it")
    with pytest.raises(InputError, match="does not contain"):
        PromptSettings.from_option(str(path), 64, 64)
    with pytest.raises(InputError, match="neither raw, chat, nor a file"):
        PromptSettings.from_option("nowhere.txt", 64, 64)


def test_wrong_students_are_refused_with_what_is_wrong(tmp_path, llama_folder):
    with pytest.raises(InputError, match="does not exist"):
        Student.load(str(tmp_path / "none"), PromptSettings())
    with pytest.raises(InputError, match=r"no config\.json"):
        Student.load(str(tmp_path), PromptSettings())
    small = tmp_path / "small"
    shutil.copytree(llama_folder, small)
    config = json.loads((small / "config.json").read_text())
    config["vocab_size"] += 8  # the weights no longer fit
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"mis-shapes|cannot load"):
        Student.load(str(small), PromptSettings())
    with pytest.raises(InputError, match="no chat template"):
        Student.load(str(llama_folder), PromptSettings(template="chat"))


def test_more_tokens_than_rows_is_refused(llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    student.tokenizer.add_tokens(["a-new-word"])
    with pytest.raises(InputError, match=r"tokens but the model only"):
        Student(student.model, student.tokenizer, PromptSettings())
