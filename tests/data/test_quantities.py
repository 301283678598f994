"""Numbers in replies: what stands beside and behind them, and last sentences whose number is not the answer."""

from __future__ import annotations

import json

import pytest

from cli.main import entry
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.replies import Reader, read_reply
from qcrd_fast.data.schema import Rationale
from qcrd_fast.data.voting import vote


def number(text: str, decimal: str = "point") -> str | None:
    return read_reply(text, "number", decimal=decimal).answer


@pytest.mark.parametrize(
    "said",
    [
        "7 thirds", "7 halves", "7 and a bit or eight", "7 and two fifths", "7 thousand and twenty", "7 dozen",
        "7 lakh",
        "7-eight", "7 to eight", "7 days and four hours", "7 blue and five green ones", "four hours and 7 minutes",
        "two and 1/7",
        "7 at most", "7 jars or more", "7 or fewer", ">=7", "above 7", "close to 7", "anything but 7",
        "7 degrees below freezing",
        "7/8/2021", "07/08/2021", "7h15", "7.15 pm", "7 r3", "7, remainder 3", "7D", "0x7F", "7--8", "7..8", "7_000_8",
    ],
)  # fmt: skip
def test_no_single_number(said):
    for text in (f"The answer is {said}.", f"Answer: {said}"):
        assert number(text) is None, text


@pytest.mark.parametrize(
    "said",
    [
        "12,50", "0,5 km", "€1.250,50", "33,33%", "1,5", "1,000,00", "1,2", "12 and then 12,50", "$3m", "£3m", "€3 m",
        "\\$3m", "USD 3m", "$3 k", "2 PM", "2 p.m.", "11am", "6 o'clock", "12 noon", "1990s", "1990's", "5 squared",
        "5 cubed", "5 factorial", "12 pi", "12 Pi cm", "12pi", "0.(3)", "0.1(6)",
    ],
)  # fmt: skip
def test_a_number_in_another_spelling_or_of_another_kind(said):
    for text in (
        said,
        f"Answer: {said}",
        f"The answer is {said}.",
        f"\\boxed{{{said}}}",
        f"We think. So it is {said}.",
    ):
        assert number(text) is None, text
    assert read_reply(f"We think. So it is {said}.", "math").answer is None


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("1,250", "1250"), ("1,250.50 dollars", "1250.5"), ("1.250", "1.25"), ("1,23,456", "123456"), ("3m", "3"),
        ("3 m", "3"), ("$3 million", "3000000"), ("$3bn", "3000000000"), ("$12/m", "12"), ("$12 me too", "12"),
        ("5s", "5"), ("5 square meters", "5"), ("25 squared cm", "25"), ("12 pieces", "12"), ("5 pies", "5"),
        ("US$12", "12"), ("5 (3 more)", None), ("12, 5 more than before", None),
    ],
)  # fmt: skip
def test_its_neighbours_stay_numbers(said, value):
    assert number(f"We think. So it is {said}.") == value


@pytest.mark.parametrize(
    "text",
    [
        "Die Antwort ist 7 Dutzend.", "Die Antwort ist mehr als 7.", "Die Antwort ist 7.15 Uhr.", "La réponse est au "
        "moins 7.",
        "La réponse est 7 et demi.", "La respuesta es 7 y media.", "La respuesta es 7 o más.", "La risposta è 7 e "
        "mezzo.",
        "La risposta è almeno 7.", "A resposta é 7 e meia.", "A resposta é pelo menos 7.", "Ответ: меньше 7.",
        "Ответ: 7-е место",
        "答案小于7。", "答案是7以下。", "答案是7个半。", "答案是第7个。", "答案是零下7度。", "答えは7未満です。",
        "答えは7番目です。", "答えは7以内です。",
    ],
)  # fmt: skip
def test_no_single_number_in_other_languages(text):
    assert number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "So eleven of the 20 are gone.", "She keeps nine out of 20.", "All 20 are gone, so nothing is left.",
        "She has no plums left after giving away 20.", "So she has twice 20.", "Es bleiben drei von 20.",
        "Il en reste trois sur 20.",
        "Non resta nessuna delle 20 mele.", "No queda ninguna de las 20.", "Não sobra nenhuma das 20.", "Осталось три "
        "из 20.",
        "20个都没有了。", "So she has 9, which is 4 more than Ann.", "So a = 9 and b = 4.", "a = 9, b = 4",
        "So n >= 9.",
        "So 3 + 4 != 9.",
        "So it is over 9.", "So she has 9 plums or more.", "So there are at most 9.", "So it was on March 9.",
        "It is half past 9.",
        "2 * 10 = 20.\n\nNote: 3 other ways exist.", "20\n\nConfidence: 95%", "20 plums.\n\nSource: page 4",
        "2 * 10 = 20\n\n[1] A book",
        "I checked this 2 times.", "Round to 2 decimal places.", "a) 9\nb) 4", "Ann: 9\nTom: 4", "| plums | 9 |\n| "
        "figs | 4 |",
        "a = 9\nb = 4", "**Answer:**\n9 plums\n4 figs", "Answer: 9 hours\n4 minutes", "**Answer:**\n- plums: 9\n- "
        "figs: 4",
        "The answers are:\n9\n4",
    ],
)  # fmt: skip
def test_a_number_that_is_not_the_answer(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("**Final answer:**\n\n- 20 plums", "20"), ("Plums: 9\nFigs: 4\nTotal: 13", "13"),
        ("So the two boys have 20.", "20"),
        ("There are 20 left after the two days.", "20"), ("So each of the three friends gets 20.", "20"),
        ("Answer: 20\n\n10 * 2", "20"),
        ("Answer: 20\n2 * 10 = 20", "20"), ("The answer is 20 plums for each of the two boys.", "20"),
        ("The answer is 5 km.", "5"),
        ("2 boxes of 10, which makes 20.", "20"), ("x = 4, so 5x = 20", "20"), ("x = y = 20", "20"),
        ("The answer is minus 20.", "-20"),
        ("La réponse est moins 20.", "-20"), ("The answer is 20 degrees.", "20"), ("Answer: 3/4", "0.75"),
    ],
)  # fmt: skip
def test_a_number_that_is(text, answer):
    assert number(text) == answer


@pytest.mark.parametrize(
    "head",
    [
        "Problem 3. y", "## Problem 3", "**Question 3**\ny", "Example 3:", "Next question: y", "Now try this: y",
        "4. Question: y",
        "Questão: y", "Ejercicio 3: y", "Задача 3. y", "問3. y", "Exercice 3 : y",
    ],
)  # fmt: skip
def test_an_invented_question_is_cut_off(head):
    assert number(f"The answer is 20.\n\n{head}\nThe answer is 9.") == "20"


def test_a_group_never_begins_with_zero():
    assert [number(f"Antwort: {text}", "comma") for text in ("0.125", "0,125", "1.125", "10.125,5")] == [
        "0.125", "0.125", "1125", "10125.5",
    ]  # fmt: skip


def test_a_number_of_a_json_file_has_a_point(tmp_path):
    row = {
        "id": "a",
        "question": "How much?",
        "gold": 1.234,
        "task": "number",
        "samples": [{"rationale": "one", "answer": 2.125}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    question = load_questions(tmp_path / "a.jsonl", reader=Reader.from_options(decimal="comma")).questions[0]
    assert (question.gold, question.majority) == ("1.234", "2.125")
    assert entry(["prepare", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "b.jsonl"), "--decimal", "comma"]) == 0
    row = json.loads((tmp_path / "b.jsonl").read_text(encoding="utf-8"))
    assert (row["gold"], row["majority"]) == ("1.234", "2.125")


def test_written_decimals_are_kept_in_a_vote():
    for texts in (("5.00", "5.001"), ("2.50", "2.504"), ("1.00", "0.999")):
        for reply in (False, True):
            samples = [
                Rationale(
                    f"It is so, {n}. The answer is {text}." if reply else f"r{n}", None if reply else text, reply=reply
                )
                for n, text in enumerate(texts)
            ]
            assert len(vote(samples, task="number").votes) == 1, (texts, reply)
    assert len(vote([Rationale("a", "5"), Rationale("b", "5.001")], task="number").votes) == 2
