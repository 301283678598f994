"""Reading and comparing answers: what counts as one answer, and what is none."""

from __future__ import annotations

import random
import unicodedata
from fractions import Fraction

import pytest

from qcrd_fast.config import TASKS
from qcrd_fast.data import answers
from qcrd_fast.data.answers import canonical, guess_task, parse_choices, same_answer, surface
from qcrd_fast.data.expressions import evaluate_expression
from qcrd_fast.data.replies import extract_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32", "32"), ("32.0", "32"), ("$32", "32"), (" 32 ", "32"), ("32.", "32"), ("+32", "32"), ("32%", "32"),
        ("1,000", "1000"), ("12,34,567", "1234567"), ("$1,234.50", "1234.5"), ("1\u202f000", "1000"),
        ("\uff13\uff12", "32"), ("\u0663\u0662", "32"), ("\uffe532", "32"),  # full-width, Arabic-Indic, yen
        ("-5", "-5"), ("\u22125", "-5"), ("\u20135", "-5"), ("- 5", "-5"), ("-.5", "-0.5"),  # minus signs
        ("1/2", "0.5"), ("\u00bd", "0.5"), ("1\u00bd", "1.5"), ("1 1/2", "1.5"), ("10/3", "3.333333333"),
        ("3.3333333333333335", "3.333333333"), ("1e5", "100000"), ("2\u00b2", "4"), ("15 + 18 = 33", "33"),
        ("32 apples", "32"), ("about 5.", "5"), ("5 and 5", "5"), ("12345678901234567890", "12345678901234567890"),
        ("\u200f32\u200e", "32"), ("3\u200d2", "32"),  # direction marks, a joiner
        ("", None), (" \n", None), ("x", None), ("between 3 and 5", None), ("1,5", None), ("9**9**9**9", None),
        ("1e999999", None), ("1/0", None), ("9" * 5000, None), ("3 4", None), ("5 -", None), (" x", None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert canonical(text, "number") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 84.0 / 2.0 )", 42), ("( ( 108.0 - 35.0 ) - 62.0 )", 11), ("(84 / 2).", 42), ("8.0", 8), ("2*-3", -6),
        ("-2**2", -4), ("2^3^2", 512), ("2**-2", Fraction(1, 4)), ("1,000 + 1", 1001), ("3 x 4", 12),
        ("6 \u00f7 4", Fraction(3, 2)),
        ("7 \u2212 2 \u00d7 3", 1), ("0.1 + 0.2", Fraction(3, 10)), ("--3", 3), ("1 - 2 - 3", -4), ("8 / 4 / 2", 1),
        ("", None), ("()", None), (")(", None), ("(1", None), ("1)", None), ("1 2", None), ("1 +", None), ("* 1", None),
        ("2 (3)", None), ("1/0", None), ("0**-1", None), ("(2 * x)", None), ("__import__('os')", None), ("1..2", None),
        ("2**0.5", None),
    ],
)  # fmt: skip
def test_expressions(text, value):
    assert evaluate_expression(text) == value


ALPHABET = (
    "0123456789.,+-*/()=%$ eExXaAbBcC:#\n\t"
    "\u00bd\u00b2\u2212\uff13\u0663\u200d\u200f\u00e9\u0301\u00df\u20ac\ud83d\U0001f600"
)


@pytest.mark.parametrize("task", TASKS)
def test_any_text_is_read_or_not_and_the_canonical_form_is_its_own(task):
    rng = random.Random(task)
    for _ in range(3000):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(12)))
        choices = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 5))) for _ in range(rng.choice((0, 3)))]
        key = canonical(text, task, choices)
        assert key != "" and (surface(text, task, choices) is None) == (key is None)
        if key is not None and task in ("number", "equation", "yes-no"):
            assert canonical(key, task) == key
        extract_answer(text, task, choices)


def test_expressions_agree_with_python():
    rng = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return f"Fraction({rng.randrange(20)})"
        left, right = expression(depth - 1), expression(depth - 1)
        return rng.choice(("({} {} {})", "{} {} {}", "-({} {} {})")).format(left, rng.choice("+-*/"), right)

    for _ in range(500):
        text = expression(4)
        try:
            expected = eval(text)
        except ZeroDivisionError:
            expected = None
        assert evaluate_expression(text.replace("Fraction", "")) == expected


@pytest.mark.parametrize(
    "text",
    [
        "**5**",
        "**5**.",
        "*5*.",
        "__5__",
        "`5`.",
        "The answer is **5**.",
        "**Answer: 5**.",
        "**Answer:** 5",
        "#### **$5**",
    ],
)
def test_emphasis_is_no_part_of_a_number(text):
    assert extract_answer(text, "number") == "5"


def test_emphasis_is_told_from_products_and_powers():
    for text, value in (("2*3*4", "24"), ("2 *3* 4", "24"), ("(2)*3*(4)", "24"), ("2**3**1", "8"), ("**2*3**", "6")):
        assert canonical(text, "number") == value and canonical(text, "equation") == value
    assert surface("**5 + 3**", "equation") == "5 + 3" and canonical("__init__", "text") == "__init__"
    choices = ("ham", "spam")
    assert [canonical(t, "choice", choices) for t in ("**b**", "**(b)**.", "*spam*", "`(a) ham`")] == [
        "spam",
        "spam",
        "spam",
        "ham",
    ]
    assert canonical("**b**", "choice") == "b"


def test_a_choice_that_is_denied_or_one_of_several_is_none():
    choices = ("bus", "car")
    for text in ("not bus", "It is not a bus.", "not (a)", "(a) and (b)", "a) or b)"):
        assert canonical(text, "choice", choices) is None, text
    assert canonical("not a bus but a car", "choice", choices) == "car"


def test_dates_are_texts_and_not_quotients():
    for dates in (["05/01/2021", "10/02/2021"], ["2020-01-05", "2020-02-04"], ["2020/1/5"]):
        assert guess_task(dates) == "text"
    assert guess_task(["10/2/5", "2000-10-5", "( 84.0 / 2.0 )"]) == "equation"


def test_equations_are_compared_by_value():
    assert same_answer("( 84.0 / 2.0 )", "42", "equation")
    assert same_answer("(84 / 2) = 42", "(21 * 2).", "equation")
    assert not same_answer("( 84.0 / 2.0 )", "( 84.0 * 2.0 )", "equation")
    assert not same_answer("(2 * x)", "(2 * x)", "equation")  # no value: never right
    assert surface(" (84 / 2). ", "equation") == "(84 / 2)"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes", "yes"), (" no.", "no"), ("TRUE", "yes"), ("false.", "no"), (" probably no.", "no"),
        ("yes, even though there is no evidence", "yes"),
        ("no or yes", None), ("yes and no", None), (" it depends.", None), ("nothing", None),
        ("not true", "no"), ("It is not always true.", "no"), ("That isn\u2019t false", "yes"),
        ("no, that is not true", "no"),
        ("I did not know. Yes.", "yes"), ("notyes", None), ("\u200eYes", "yes"),
        (" that it is not common to see frost during some college commencements.", None),
        ("So the answer is no.", "no"), ("Yes and no. In the end, the answer is: Yes", "yes"),
    ],
)  # fmt: skip
def test_yes_no(text, word):
    assert extract_answer(text, "yes-no") == word


CHOICES = ("park", "coloring book", "Garden Center", "math problem", "gravity")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("(d) math problem.", "math problem"), ("d", "math problem"), ("(D)", "math problem"), ("d.", "math problem"),
        ("So the answer is (c) garden center.", "Garden Center"), ("garden  center", "Garden Center"),
        ("the park", "park"),
        ("(a) park or (b) coloring book", "park"),  # it names one first
        ("either (a) park or (b) coloring book", None), ("park or gravity", None), ("probably (e)", "gravity"),
        ("(f) sky", None),
        ("sky", None), ("parking", None),
    ],
)  # fmt: skip
def test_choices(text, choice):
    assert extract_answer(text, "choice", CHOICES) == choice


def test_choices_that_are_not_known():
    assert canonical("(c) Train Station.", "choice") == "train station"
    assert canonical("(C)", "choice") == "c"
    assert same_answer("(c)", "C", "choice") and same_answer("(c) train station", "c", "choice")
    assert not same_answer("(c) train station", "d", "choice")
    assert extract_answer("So the answer is (c) train station.", "choice") == "train station"


def test_parse_choices():
    assert parse_choices("Where?\nAnswer Choices:\n(a) park\n(b) zoo ") == ("park", "zoo")
    assert parse_choices("Where?\nA) park\nB) zoo\nC) sea") == ("park", "zoo", "sea")
    assert parse_choices("a. Plan b was good.") == () == parse_choices("Where?")


@pytest.mark.parametrize(
    ("text", "task", "answer"),
    [
        ("32.0", "number", "32"), ("He has 3 + 4 = 7 apples.\nSo 7 remain.", "number", "7"),
        ("#### 1,000", "number", "1000"),
        ("so \\boxed{5}.", "number", "5"), ("The answer is 5. Then 7.", "number", "5"),
        ("Answer: **12**\n\nQ: 13", "number", "12"),
        ("First the answer is 3. No, the answer is 4.", "number", "4"), ("nothing", "number", None),
        ("The answer is (84 / 2).", "equation", "(84 / 2)"), ("The answer is ((491 - 21", "equation", None),
        ("the answer is Paris.", "text", "Paris"), ("Paris", "text", "Paris"), ("Two\nlines", "text", None),
        ("", "text", None),
    ],
)  # fmt: skip
def test_extract(text, task, answer):
    assert extract_answer(text, task) == answer


def test_unicode_forms_of_a_text_are_one_answer():
    composed, decomposed = unicodedata.normalize("NFC", "Café"), unicodedata.normalize("NFD", "Café")
    assert composed != decomposed and same_answer(composed, decomposed, "text")
    # right-to-left, with marks
    assert same_answer("\u05e9\u05dc\u05d5\u05dd", "\u200f\u05e9\u05dc\u05d5\u05dd\u200f", "text")
    assert same_answer("co\u00adop", "coop", "text")  # a soft hyphen
    assert same_answer("STRASSE", "stra\u00dfe", "text") and same_answer('"The  End."', "the end", "text")
    assert not same_answer("", "", "text") and same_answer("?", "?", "text")


@pytest.mark.parametrize(
    ("given_answers", "task"),
    [
        (["32", "32.0", "1,000", "1/2", "$5"], "number"), (["( 84.0 / 2.0 )", "8.0", "( 1 + 2 )"], "equation"),
        (["Yes", "no", "No."], "yes-no"),
        (["a", "(B)", "c."], "choice"), (["park", "zoo"], "text"), ([], "text"), (["", " "], "text"),
        (["1"] * 30 + ["x"], "number"),
        (["12 km", "10kg", "3.5 m/s", "25 square feet", "4 m\u00b2", "30 \u00b0C", "1/2 hour", "50 cents"], "number"),
        (["12 km", "$5", "25%", "7"], "number"), (["10 Downing Street"], "text"), (["Room 12"], "text"),
        (["5 apples and 3 pears"], "text"), (["5 ft 3 in"], "text"), (["3 hours 20 minutes"], "text"),
        (["5-7 km"], "text"), (["3 pm"], "text"), (["3 May"], "text"), (["5 km north"], "text"), (["4th"], "text"),
        (["7 Up"], "text"), (["10 minutes to midnight"], "text"), (["12 \\text{ cm}"], "math"),
        (["12 km", "Paris"], "text"), (["2000-10-05"], "text"), (["3 + 4 km"], "text"),
        (["1", "x"], "text"),
    ],
)  # fmt: skip
def test_guess_task(given_answers, task):
    assert guess_task(given_answers) == task


def test_every_task_is_handled():
    assert all(canonical("1", task) for task in TASKS if task != "yes-no")
    assert answers.canonical("true", "yes-no") == "yes"
