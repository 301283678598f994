"""Scores of rows: against eager computations of a few lines, in another order, after a stop, on T5 and a decoder."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.branches import branch_hidden
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.select.asking import Explanation, choose_ask, entropy, groups
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.registry import SELECTORS, parse_names
from qcrd_fast.select.score import Block, score_all, score_rows
from qcrd_fast.select.steps import split_steps
from qcrd_fast.select.uncertainty import branch_tokens, intra, prefix_logprobs

NAMES = list(SELECTORS)
OPTIONS = SelectOptions(num_samples=2, num_continuations=2, max_new_tokens=6, block_size=3)
FEW = 5  # rows, where a test scores them several times


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request):
    found = Student.load(str(request.getfixturevalue(request.param)), PromptSettings())
    found.model.eval()
    return found


@pytest.fixture(scope="session")
def rows(rows_file):
    return load_questions(rows_file).questions[:6]


def explanations(student, rows):
    """The teacher's rationales as the student's, up to four in one so that there are many steps; and one without a
    step."""
    rows = rows[:4]
    texts = [" ".join(other.positives[0].text for other in rows[: i % 4 + 1]) for i in range(len(rows))]
    found = [
        Explanation(student.source_ids("reason: ", row.question), tuple(split_steps(text)), str(row.majority))
        for row, text in zip(rows, texts, strict=True)
    ]
    return [*found, Explanation(found[0].prompt, (), "7")]


@pytest.mark.usefixtures("float64")
def test_packed_intra_is_that_of_one_prefix_at_a_time(student, rows):
    """Against the model's own logits, one forward pass a prefix and no code of ours."""
    said = explanations(student, rows)
    assert max(len(e.steps) for e in said) >= 6
    eager = []
    for e in said:
        answer = [*student.piece_ids("\nAnswer:"), *student.piece_ids(f" {e.answer}"), student.tokenizer.eos_token_id]
        skip = len(student.piece_ids("\nAnswer:"))
        eager.append([])
        for i in range(len(e.steps) + 1):
            reply = [token for step in e.steps[:i] for token in student.piece_ids(step)] + answer
            with torch.no_grad():
                if student.is_encoder_decoder:
                    fed = torch.tensor([[student.start_id, *reply[:-1]]])
                    logits = student.model(input_ids=torch.tensor([e.prompt]), decoder_input_ids=fed).logits[0]
                else:
                    logits = student.model(input_ids=torch.tensor([e.prompt + reply[:-1]])).logits[
                        0, len(e.prompt) - 1 :
                    ]
            chosen = logits.log_softmax(-1)[range(len(reply)), reply]
            eager[-1].append(float(chosen[len(reply) - len(answer) + skip :].sum()))
    packed = prefix_logprobs(student, said)
    assert [len(moves) for moves in packed] == [len(e.steps) + 1 for e in said]
    for ours, theirs in zip(packed, eager, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12, rel=0)
    means = [sum(abs(b - a) for a, b in itertools.pairwise(m)) / max(len(m) - 1, 1) for m in eager]
    assert intra(student, said) == pytest.approx(means, abs=1e-12, rel=0)
    assert intra(student, said, packed=False) == pytest.approx(means, abs=1e-12, rel=0)
    assert means[-1] == 0 and min(means[:-1]) > 0


def test_packed_intra_costs_less_than_two_passes_over_the_explanations(student, rows):
    """In tokens that run through the model, padding included."""
    said = explanations(student, rows)[3:-1]  # the longest
    tokens = branch_tokens(student, said)
    with torch.no_grad():
        packed = branch_hidden(student, *tokens[:5]).body_tokens
        by_prefix = branch_hidden(student, *tokens[:5], packed=False).body_tokens
        plain = student.hidden([e.prompt for e in said], tokens[1], range(len(said))).body_tokens
    assert packed < 2 * plain < by_prefix


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["loss", "ppl"])
def test_ifd_is_that_of_a_few_eager_lines(student, rows, form):
    def nll(source, target):
        with torch.no_grad():
            if student.is_encoder_decoder:
                fed = torch.tensor([[student.start_id, *target[:-1]]])
                logits = student.model(input_ids=torch.tensor([source]), decoder_input_ids=fed).logits[0]
            else:
                logits = student.model(input_ids=torch.tensor([source + target[:-1]])).logits[0, len(source) - 1 :]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item()

    expected = []
    for row in rows:
        expected.append([])
        for rationale in row.positives:
            target = student.target_ids(rationale.text)
            given = nll(student.source_ids(EXPLAIN, row.question), target)
            alone = nll([student.tokenizer.eos_token_id], target)
            expected[-1].append(given / alone if form == "loss" else math.exp(given) / math.exp(alone))
    found = score_all(rows, ["ifd"], student, SelectOptions(ifd_form=form))
    assert len(expected[0]) > 1
    for scores, wanted in zip(found, expected, strict=True):
        assert scores.positives["ifd"] == pytest.approx(wanted, rel=1e-12)
        assert scores.row["ifd"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_local_naturalness_with_a_window_over_everything_is_naturalness(student, rows):
    """But for the tokens of the steps, which are those of the rationale in the tests' tokenizer; a short window
    differs."""
    wide, narrow = (score_rows(rows, ["local-naturalness"], student, SelectOptions(window=n)) for n in (4000, 3))
    plain = score_rows(rows, ["naturalness"], student)
    for row in rows:
        for r in row.positives:
            joined = [t for step in split_steps(r.text.strip()) for t in student.piece_ids(step)]
            assert joined == student.target_ids(r.text)[:-1]
    for a, b, c in zip(wide, plain, narrow, strict=True):
        assert a["local-naturalness"] == pytest.approx(b["naturalness"], rel=1e-12)
        assert c["local-naturalness"] != a["local-naturalness"]


def test_scores_permute_with_their_rows_and_survive_a_stop_to_the_bit(student, rows):
    rows = rows[:FEW]
    whole = score_all(rows, NAMES, student, OPTIONS)
    backwards = score_all(rows[::-1], NAMES, student, OPTIONS)
    assert backwards == whole[::-1]
    kept: dict = {}

    def stop(block):
        kept.update(block)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_all(rows, NAMES, student, OPTIONS, on_block=stop)
    assert len(kept) == 3
    later: list = []
    assert score_all(rows, NAMES, student, OPTIONS, finished=kept, on_block=later.append) == whole
    assert sum(map(len, later)) == 2
    for scores in whole:
        assert set(scores.row) == set(NAMES)
        assert all(math.isfinite(s) for s in scores.row.values())


def test_a_seed_moves_what_is_drawn_and_nothing_else(student, rows):
    rows = rows[:2]
    a, b = (score_rows(rows, NAMES, student, SelectOptions(**{**vars(OPTIONS), "seed": seed})) for seed in (0, 1))
    drawn = {"random", "answer-entropy", "step-uncertainty", "known"}
    for name in NAMES:
        if name not in drawn:
            assert [row[name] for row in a] == [row[name] for row in b]
    assert [row["random"] for row in a] != [row["random"] for row in b]


NUMBER = Question(
    "q", "How many?", task="number", majority="4", votes={"4": 3, "5": 1}, positives=(Rationale("2 + 2 = 4."),)
)


def test_answers_are_counted_by_their_value_and_what_cannot_be_read_by_itself():
    assert groups(NUMBER, ["4", "4.0", "5", None, None]) == [2, 1, 1, 1]
    assert groups(NUMBER, [None, None]) == [1, 1]
    assert entropy([2]) == 0
    assert entropy([1, 1, 2]) == pytest.approx(1.5 * math.log(2))


def test_scores_by_hand(monkeypatch):
    block = Block([NUMBER], None, SelectOptions(num_samples=4))
    monkeypatch.setitem(vars(block), "answers", [["4", "4.00", "7", None]])
    assert SELECTORS["known"].score(block) == [0.5]
    assert SELECTORS["answer-entropy"].score(block) == [pytest.approx(1.5 * math.log(2))]
    assert SELECTORS["agree"].score(block) == [0.75]
    [scores] = score_all([NUMBER], ["quality", "agree"], None)
    assert scores.positives["quality"] == [scores.row["quality"]]


def test_a_mean_over_equal_scores_ties_with_one_of_them():
    three = dataclasses.replace(NUMBER, id="three", positives=NUMBER.positives * 3)
    one, many = score_rows([NUMBER, three], ["quality"], None, SelectOptions(quality="vote"))
    assert one == many and sum([one["quality"]] * 3) / 3 != one["quality"]  # a plain mean is off in its last bit


def test_a_score_that_is_not_finite_ends_the_command(monkeypatch):
    kept: dict = {}
    for name, wrong in (("random", [0.5, math.nan]), ("quality", [[0.5], [0.5, -math.inf]])):
        monkeypatch.setitem(SELECTORS, name, dataclasses.replace(SELECTORS[name], score=lambda block, s=wrong: s))
        with pytest.raises(RunError, match=f"--by {name} gave a score that is not finite, .*; question r"):
            score_all([NUMBER, dataclasses.replace(NUMBER, id="r")], [name], on_block=kept.update)
    assert not kept


def test_a_row_without_votes_answers_or_rationales_has_no_score(student):
    bare = Question("b", "How many?", task="number")
    found = score_rows([bare], ["agree", "known", "ifd", "local-naturalness", "quality", "random"], student, OPTIONS)
    assert [name for name, score in found[0].items() if score is None] == [
        "agree", "known", "ifd", "local-naturalness", "quality",
    ]  # fmt: skip


def test_what_is_refused(student):
    with pytest.raises(InputError, match="ifd needs --student"):
        score_rows([NUMBER], ["ifd"])
    with pytest.raises(InputError, match="same id"):
        score_rows([NUMBER, NUMBER], ["random"])
    with pytest.raises(InputError, match="did you mean 'answer-entropy'"):
        parse_names("random,answer-entropie")
    with pytest.raises(InputError, match="each once"):
        parse_names("ifd,ifd")
    with pytest.raises(InputError, match="reasoning-task"):
        choose_ask("reason", student, {"config": {"reasoning_task": False}})
    with pytest.raises(InputError, match="chat template"):
        choose_ask("zero-shot", student, {})
    assert choose_ask("auto", student, {"config": {"reasoning_task": True}}) == "reason"
    assert choose_ask("auto", student, {"config": {"reasoning_task": False}}) == "predict"
    assert choose_ask("auto", student, {}) == "reason"
