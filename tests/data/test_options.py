"""Which option of its question a reply names: denials, lists, two letters, numbers and words as options."""

from __future__ import annotations

import pytest

from qcrd_fast.data.answers import canonical, same_answer
from qcrd_fast.data.choices import Choices, parse_choices
from qcrd_fast.data.replies import Reader, read_reply

OPTIONS = Choices(("spoon", "kettle", "ladder"))
LABELLED = ("(A) spoon", "A: spoon", "[A] spoon")


def read(text: str, options: tuple[str, ...] = OPTIONS) -> str | None:
    return read_reply(text, "choice", options).answer


@pytest.mark.parametrize(
    "text",
    [
        "I do not believe B is right.", "Please don't pick B.", "Never choose C.", "We can rule out (C).",
        "(C) is excluded.",
        "Nobody boils water in a ladder.", "All but the spoon.", "Anything except a kettle.", "The ladder is too long.",
        "(A) makes little or no sense.", "B fails.", "The kettle is unlikely.", "Option B is not it.",
        "It isn't the kettle.",
        "The least plausible answer is B.", "The second best option is B.", "The kettle might work.",
        "If B, then it boils.",
        "B ist falsch.", "Ich würde B nicht wählen.", "Alles außer dem kettle.", "B est fausse.",
        "Je ne choisis pas B.",
        "La B es incorrecta.", "No elijo B.", "La B è sbagliata.", "Non scelgo B.", "A B está errada.",
        "Não escolho B.",
        "Вариант B неверный.", "Не B.", "不选B。", "B选项是错的。", "B不对。", "Bではない。", "Bは間違いです。",
        "Answer: not B", "The answer is not B.", "I was going to say B, but the ladder is longer.",
    ],
)  # fmt: skip
def test_what_is_denied_is_not_chosen(text):
    assert read(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Hence B", "So B.", "So it's B.", "It must be B.", "A and C are wrong. So B.", "A is wrong, so it is B.",
        "Thus (B).",
        "The answer is B, not C.", "The answer is B rather than C.", "Not A but B.", "The answer is not A but B.",
        "B fits.",
        "The answer is B because A is no vessel.", "The answer is a kettle because a spoon is small.", "B works.",
        "Also B.", "Die Antwort ist B, nicht A.", "Die richtige Antwort ist nicht A, sondern B.", "B ist richtig.",
        "Donc B.", "La réponse est B, pas A.", "La respuesta es B, no A.", "Por lo tanto, B.",
        "La risposta è B, non A.",
        "Quindi B.", "A resposta é B, não A.", "A alternativa correta é a B.", "Значит, B.", "Ответ: B, а не A",
        "答案是B，不是C。", "答案不是A，而是B。", "所以选B。", "答えはBです。", "よってB。", "Q: Which one?\nA: B",
        "- A) spoon: wrong\n- B) kettle: correct\n- C) ladder: wrong", "A: no\nB: yes\nC: no", "B (kettle)",
        "kettle (B)",
    ],
)  # fmt: skip
def test_what_is_settled_on_is_chosen(text):
    assert read(text) == "kettle"


@pytest.mark.parametrize(
    "text",
    [
        "Answer: (A)(C)", "Answer: A; C", "Answer: A, C", "Answer: A\nC", "Answer: AC", "A & C", "A oder C", "A et C",
        "A y C",
        "A e C", "A и C", "A和C", "AまたはC", "Answer: A, perhaps C", "A (kettle)", "A. kettle", "(A) kettle",
        "ladder (B)",
        "The answer is A. kettle", "- A) spoon: stirs\n- B) kettle: boils\n- C) ladder: leads up",
        "**A**: stirring. **B**: boiling. **C**: climbing.", "A: yes\nB: yes\nC: no", "A fire kettle.",
        "(B) kettle. So the spoon.",
    ],
)  # fmt: skip
def test_two_options_are_none(text):
    assert read(text) is None


NUMBERS = Choices(("4", "24", "40", "2"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6*4=24", "24"), ("6 * 4 = 26.", None), ("The answer is 4.2.", None), ("The answer is -4.", None),
        ("4 000", None),
        ("The answer is at most 4.", None), ("The answer is 2.40", None), ("The answer is more than 40.", None),
        ("4", "4"),
        ("The answer is 4 million.", None), ("The answer is (B) 24.", "24"), ("(B) 40", None), ("(B) 24.5", None),
        ("B", "24"),
        ("We get 40.", "40"), ("It is 4 or 40.", None), ("The answer is 24.0", "24"), ("\\boxed{24}", "24"),
    ],
)  # fmt: skip
def test_options_that_are_numbers(text, answer):
    assert read(text, NUMBERS) == answer


@pytest.mark.parametrize(
    ("options", "text", "answer"),
    [
        (("C", "B", "A"), "(A)", "(a) C"), (("C", "B", "A"), "It is blood group A.", None),
        (("C", "B", "A"), "A", None),
        (("yes", "no", "maybe"), "There is no reason.", None), (("yes", "no", "maybe"), "No one can say.", None),
        (("yes", "no", "maybe"), "The answer is no.", "no"), (("yes", "no", "maybe"), "No.", "no"),
        (("bus", "bus stop", "stop"), "One waits at the bus stop.", "bus stop"),
        (("bus", "bus stop"), "(A) bus stop", None),
        (("bus", "bus stop"), "(B) bus stop", "bus stop"), (("stop", "car"), "A bus stop.", None),
        (("too heavy", "not heavy"), "The answer is not heavy.", "not heavy"), (("a car", "a cat"), "A car.", "a car"),
    ],
)  # fmt: skip
def test_options_that_hold_each_other_or_are_little_words(options, text, answer):
    assert read(text, options) == answer
    if answer:  # what is taught reads as the same option
        assert Reader().answer(answer, "choice", options)[0] == answer


RAISED = ("10\u00b2", "102")
INTERVALS = ("(0, 1)", "[0, 1)", "(0, 1]", "[0, 1]")


@pytest.mark.parametrize(
    ("options", "text", "answer"),
    [
        (INTERVALS, "D", "[0, 1]"), (INTERVALS, "(A)", "(0, 1)"), (INTERVALS, "[0, 1)", "[0, 1)"),
        (INTERVALS, "The answer is (0, 1].", "(0, 1]"), (INTERVALS, "\\boxed{[0, 1]}", "[0, 1]"),
        (INTERVALS, "The answer is $[0, 1)$.", "[0, 1)"), (INTERVALS, "**[0, 1)**", "[0, 1)"),
        (INTERVALS, "The answer is (D) [0, 1], not (0, 1).", "[0, 1]"), (INTERVALS, "0, 1", None),
        (INTERVALS, "D) (0, 1)", None), (INTERVALS, "D (0, 1)", None), (INTERVALS, "the interval (0, 1) (D)", None),
        (INTERVALS, "the interval [0, 1] (D)", "[0, 1]"), (INTERVALS, "The answer is 0, 1.", None),
        (("Co", "CO"), "Co", "Co"), (("Co", "CO"), "The answer is CO.", "CO"), (("Co", "CO"), "co", None),
        (("Co", "CO"), "the CO", "CO"), (("Co", "CO"), "B) Co", None), (("Co", "CO"), "B) CO", "CO"),
        (("x", "X"), "X.", "X"), (("x", "X"), "(a) X", None), (("x", "X"), "A", "x"), (("x", "X"), "B", "X"),
        (("a", "A"), "a", "a"), (("a", "A"), "A", None), (("a", "A"), "(A)", "a"), (("a", "A"), "(b)", "(b) A"),
        (("3", "3!"), "3!", "3!"), (("3", "3!"), "3.", "3"), (("3", "3!"), "3.0", "3"), (("3", "3!"), "A) 3!", None),
        (("5", ".5"), ".5", ".5"), (("5", ".5"), "5.", "5"), (("5", ".5"), "0.5", ".5"), (("5", ".5"), "B. .5", ".5"),
        (("Really!", "Really?"), "Really?", "Really?"), (("Really!", "Really?"), "really!", "Really!"),
        (("Really!", "Really?"), "Really", None), (("Really!", "Really?"), "(A) Really", "Really!"),
        (RAISED, "(a)", "10\u00b2"), (RAISED, "The answer is 102.", "102"), (RAISED, "10^2", "10\u00b2"),
        (RAISED, "B) 10\u00b2", None), (("5 m\u00b2", "4 m\u00b2"), "5 m2", "5 m\u00b2"),
        (("Paris!", "Rome"), "PARIS", "Paris!"), (("foo", "foo"), "(B) foo", "foo"), (("foo", "foo"), "Foo.", "foo"),
    ],
)  # fmt: skip
def test_options_that_differ_in_case_or_punctuation_alone(options, text, answer):
    assert read(text, options) == answer
    assert Reader().answer(text, "choice", options)[0] == answer
    if answer:  # what is taught reads as the same option
        assert same_answer(answer, text, "choice", options) or len(text) > 20
        assert Reader().answer(answer, "choice", options)[0] == answer


def test_options_of_one_plain_text_have_keys_of_their_own():
    assert [canonical(letter, "choice", INTERVALS) for letter in "ABCD"] == list(INTERVALS)
    assert not same_answer("A", "D", "choice", INTERVALS) and same_answer("D", "[0, 1]", "choice", INTERVALS)
    assert canonical("A", "choice", ("Paris!", "Rome")) == "paris"
    assert same_answer("A", "B", "choice", ("foo", "foo"))  # one text at two letters


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"), ("The answer is (b).", "B"), ("Answer: C) a kettle", "C"), ("So B.", "B"), ("B is wrong.", None),
        ("A dog barks.", None), ("The answer is unknown.", None), ("The answer is not clear.", None),
        ("Answer: BC", None),
        ("It cannot be said.", None), ("The answer is that nobody knows.", None), ("Die Antwort ist unklar.", None),
        ("The answer is a kettle.", None), ("La réponse est inconnue.", None), ("答案不明。", None),
    ],
)  # fmt: skip
def test_options_that_are_not_known(text, answer):
    said = read(text, Choices())
    if "a kettle" in text:
        assert said == "a kettle"
    else:
        assert (said or "").upper() == (answer or "")


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Which?\n**A.** fox\n**B.** hen", ("fox", "hen")), ("Which?\nA | fox\nB | hen", ("fox", "hen")),
        ("哪个？【A】狐【B】鸡", ("狐", "鸡")), ("Which?\nＡ．fox\nＢ．hen", ("fox", "hen")),
        ("Which? (A) fox (B) hen. Answer with one letter.", ("fox", "hen")),
        ("Which?\n(A) fox\nof red\n(B) hen", ("fox of red", "hen")),
        ("(a) Find 3+4. (b) Find 5+6.", ()), ("Tim (A) has 3, Ann (B) has 4. How many are there?", ()),
        ("Group A: 3 wins. Group B: 5 wins. How many wins?", ()),
        ("$\\textbf{(A)}\\ 7 \\qquad\\textbf{(B)}\\ 8$", ("7", "8")),
    ],
)  # fmt: skip
def test_options_of_a_question(question, found):
    assert parse_choices(question) == found


CYRILLIC = parse_choices("2 + 2?\nА) 3\nБ) 4\nВ) 5\nГ) 6")
GREEK = parse_choices("2 + 2?\n(α) 3\n(β) 4\n(γ) 5")


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("2 + 2?\nА) 3\nБ) 4\nВ) 5", ("3", "4", "5")), ("2 + 2? (а) 3 (б) 4", ("3", "4")),
        ("Сколько?\nА. три\nБ. четыре", ("три", "четыре")), ("Кто? А: Анна Б: Борис", ("Анна", "Борис")),
        ("Какая?\nА) группа А\nБ) группа В", ("группа А", "группа В")), ("2 + 2?\nΑ) 3\nΒ) 4", ("3", "4")),
        ("Где родился поэт?\nА. С. Пушкин родился в Москве.", ()), ("Это а) или б)?", ()),
        ("Сколько?\nA) три\nB) четыре", ("три", "четыре")), ("Сколько?\n1. три\n2. четыре", ("три", "четыре")),
    ],
)  # fmt: skip
def test_options_in_other_alphabets(question, found):
    assert parse_choices(question) == found


@pytest.mark.parametrize(
    ("options", "text", "answer"),
    [
        (CYRILLIC, "Б", "4"), (CYRILLIC, "б", "4"), (CYRILLIC, "Ответ: Б", "4"), (CYRILLIC, "Ответ: Б) 4", "4"),
        (CYRILLIC, "Ответ: 4", "4"), (CYRILLIC, "2 + 2 = 4. Ответ: (Б).", "4"), (CYRILLIC, "\\boxed{В}", "5"),
        (CYRILLIC, "Вариант Б верный.", "4"), (CYRILLIC, "Ответ: Б, потому что 2 + 2 = 4.", "4"),
        (CYRILLIC, "А) 3: нет\nБ) 4: верно\nВ) 5: нет", "4"), (CYRILLIC, "Ответ: Б) 5", None),
        (CYRILLIC, "Ответ: А или Б", None), (CYRILLIC, "Ответ: не Б", None), (CYRILLIC, "Не Б.", None),
        (CYRILLIC, "A", "3"), (CYRILLIC, "B", None), (CYRILLIC, "C", None), (CYRILLIC, "Ответ: Д", None),
        (GREEK, "Γ", "5"), (GREEK, "Answer: (β)", "4"), (GREEK, "B", "4"), (GREEK, "C", None), (GREEK, "γ) 5", "5"),
        (OPTIONS, "Ответ: Б", None), (OPTIONS, "Ответ: B", "kettle"),
    ],
)  # fmt: skip
def test_replies_with_letters_of_other_alphabets(options, text, answer):
    assert read(text, options) == answer
