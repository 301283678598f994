"""The vote: majority, ties, samples that cannot vote, and independence of order."""

from __future__ import annotations

import itertools
import random
import unicodedata

import pytest

from qcrd_fast.data.schema import Rationale
from qcrd_fast.data.voting import vote


def samples(*answers: str | None) -> list[Rationale]:
    return [Rationale(f"reason {index}", answer) for index, answer in enumerate(answers)]


def texts(rationales) -> list[str]:
    return [rationale.text for rationale in rationales]


def test_majority_and_minority():
    result = vote(samples("32", "25", "32.0", "$32", "25"), task="number")
    assert result.majority == "32" and result.votes == {"32": 3, "25": 2} and not result.tied
    assert texts(result.positives) == ["reason 0", "reason 2", "reason 3"]
    assert texts(result.negatives) == ["reason 1", "reason 4"]
    assert {r.answer for r in result.positives} == {"32"}


def test_the_same_rationale_with_the_same_answer_counts_once():
    rows = [Rationale("a", "1"), Rationale(" a ", "1.0"), Rationale("b", "2"), Rationale("a", "2")]
    result = vote(rows, task="number")
    assert result.votes == {"2": 2, "1": 1} and result.duplicates == 1
    composed, decomposed = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert vote([Rationale(composed, "1"), Rationale(decomposed, "1")], task="number").duplicates == 1


def test_what_cannot_vote_is_dropped_and_counted():
    rows = [*samples("1", None, "", "x", "1"), Rationale("  ", "2")]
    result = vote(rows, task="number")
    assert (
        result.votes == {"1": 2, "2": 1}
        and result.dropped == 3
        and result.without_rationale == 1
        and not result.negatives
    )


def test_all_empty_none_and_one():
    for rows in ([], samples("", None, " ")):
        result = vote(rows, task="number")
        assert (result.majority, result.votes, result.positives, result.negatives) == (None, {}, (), ())
        assert result.dropped == len(rows) and not result.tied
    assert vote(samples("7"), task="number").majority == "7"  # fewer than K


def test_a_tie_is_settled_by_seed_and_question_and_not_by_order():
    rows = samples("1", "2", "3")  # all distinct
    winners = {vote(order, seed=0, question_id="q", task="number").majority for order in itertools.permutations(rows)}
    assert len(winners) == 1 and vote(rows, task="number").tied
    by_question = [vote(rows, question_id=str(i), task="number").majority for i in range(90)]
    by_seed = [vote(rows, seed=i, question_id="q", task="number").majority for i in range(90)]
    for found in (by_question, by_seed):
        assert all(15 < found.count(answer) < 45 for answer in "123")  # no answer is favoured


def test_split_by_gold_keeps_the_majority_of_the_vote():
    result = vote(samples("1", "1", "2"), task="number", gold="2.0")
    assert result.majority == "1" and texts(result.positives) == ["reason 2"] and len(result.negatives) == 2
    assert vote(samples("1"), task="number", gold="5").positives == ()


def test_answers_are_spelled_as_most_samples_do():
    result = vote(samples("(84 / 2)", "(84 / 2).", "( 21 * 2 )", "(9 - 1)"), task="equation")
    assert result.majority == "(84 / 2)" and result.votes == {"(84 / 2)": 3, "(9 - 1)": 1}
    assert result.votes[result.majority] == 3
    choices = ("Garden Center", "park")
    result = vote(samples("(a)", "a", "garden center", "park"), task="choice", choices=choices)
    assert result.votes == {"Garden Center": 3, "park": 1}
    result = vote(samples(" probably no.", " yes, it is.", "No"), task="yes-no")
    assert result.votes == {"no": 2, "yes": 1}


@pytest.mark.parametrize("seed", range(100))
def test_order_does_not_matter_and_no_sample_is_lost(seed):
    rng = random.Random(seed)
    rows = samples(*rng.choices(["1", "1.0", "2", "\uff12", "3", "", "x", None], k=rng.randrange(10)))
    result = vote(rows, question_id="q", task="number")
    rng.shuffle(rows)
    again = vote(rows, question_id="q", task="number")
    assert (again.majority, list(again.votes.items())) == (result.majority, list(result.votes.items()))
    assert set(again.positives) == set(result.positives) and set(again.negatives) == set(result.negatives)
    assert len(result.positives) + len(result.negatives) + result.dropped == len(rows)
    assert sum(result.votes.values()) == len(result.positives) + len(result.negatives)
