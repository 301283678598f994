"""When two answers are one: rounding, tolerance, leaders of groups, formulas, options; and the keys of questions."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast.data.answers import groups, guess_task, read_value, same_answer
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.replies import Reader
from qcrd_fast.data.schema import Question, Rationale, leak_key, text_key
from qcrd_fast.data.voting import vote


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("33.33", "33.3333", True), ("33.33", "100/3", True), ("33.3", "100/3", False), ("33", "33.004", False),
        ("33.00", "33.004", True),
        ("14.28", "100/7", True), ("14.29", "100/7", True), ("14.30", "100/7", False), ("-0.67", "-2/3", True),
        ("0.67", "-2/3", False),
        ("0.5", "1/2", True), ("2.50", "2.5", True), ("3.14", "3.15", False), ("1e5", "100000", True),
        ("50%", "50", True),
    ],
)  # fmt: skip
def test_numbers_agree_rounded_or_cut(a, b, same):
    assert same_answer(a, b, "number") == same == same_answer(b, a, "number")


def test_tolerance():
    assert not same_answer("33.33", "100/3", "number", tolerance=Fraction(0))
    assert same_answer("33.3", "33.4", "number", tolerance=Fraction(1, 10)) and same_answer(
        "5", "5.0", "number", tolerance=Fraction(0)
    )


def test_groups_are_led_by_the_most_precise_and_never_chained():
    texts = ["33.335", "33.33", "33.3333", "33.34", "100/3"]
    for order in itertools.permutations(texts):
        values = [read_value(text, "number") for text in order]
        led = dict(zip(order, (order[i] for i in groups(values, "number")), strict=True))
        assert led == {"33.335": "33.335", "33.34": "33.335", "33.33": "100/3", "33.3333": "100/3", "100/3": "100/3"}


def test_a_vote_by_rounded_values():
    result = vote([Rationale(str(i), a) for i, a in enumerate(("33.33", "33.3333", "100/3", "7", "7"))], task="number")
    assert result.majority == "33.33" and result.votes == {"33.33": 3, "7": 2} and len(result.positives) == 3
    exact = vote(
        [Rationale(str(i), a) for i, a in enumerate(("33.33", "33.3333", "7", "7"))],
        task="number",
        reader=Reader.from_options(tolerance=0),
    )
    assert exact.majority == "7"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("\\frac{1}{2}", "0.5", True), ("\\dfrac{1}{2}", "\\frac12", True), ("(1, 2]", "\\left(1,2\\right]", True),
        ("(1,2]", "[1,2]", False),
        ("2\\sqrt{3}", "2 \\sqrt 3", True), ("x = 5", "5", True), ("\\{1, 2\\}", "\\{1,2\\}", True),
        ("\\{1,2\\}", "(1,2)", False), ("$12$", "\\text{12}", True),
        ("3\\pi", "3 \\pi", True), ("\\pi", "3.14", False),
        ("\\binom{7}{31}", "\\binom{73}{1}", False), ("\\dbinom{7}{3}", "\\binom73", True),
        ("\\frac{\\pi}{6}", "\\pi/6", True),
        ("\\begin{pmatrix}3\\\\4\\end{pmatrix}", "\\begin{pmatrix}34\\end{pmatrix}", False),
    ],
)  # fmt: skip
def test_formulas(a, b, same):
    assert same_answer(a, b, "math") == same == same_answer(b, a, "math")


def test_tasks_are_guessed_through_latex():
    assert guess_task(["\\dfrac{1}{2}", "(1, 2]", "12"]) == "math" and guess_task(["\\frac{1}{2}", "3/4"]) == "number"


def test_options_by_letter_or_text_and_booleans():
    options = ("oven", "train")
    assert same_answer("B", "train", "choice", options) and same_answer("(b)", "B) train", "choice", options)
    assert same_answer("true", "yes", "yes-no") and not same_answer("false", "yes", "yes-no")


def test_pooling_and_leak_keys():
    def keys(text: str) -> tuple[str, str]:
        question = Question("q", text)
        return text_key(question), leak_key(question)

    assert (
        keys("What is  2+2? ")[0] == keys("What is\u00a02+2?")[0] == keys("What is ２+2?")[0] != keys("what is 2+2?")[0]
    )
    same = (
        "Ann has 2 jars.  How many ?",
        "ann has 2 jars. How many?",
        "Ann has 2 jars How many",
        "Ann has 2 jars; how many?!",
    )
    assert len({keys(text)[1] for text in same}) == 1
    assert keys("What is ( 3 + 4 ) * 2 ?")[1] == keys("What is (3+4)*2?")[1] != keys("What is 3+4*2?")[1]
    unlike = (
        ("What is 2.5?", "What is 25?"),
        ("What is .5?", "What is 5?"),
        ("What is 3+4?", "What is 3-4?"),
        ("1,5 of 2?", "15 of 2?"),
    )
    for a, b in unlike:
        assert keys(a)[1] != keys(b)[1]


# prepare


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_nothing_readable_is_exit_2_without_a_file(tmp_path, capsys):
    data = write(
        tmp_path / "a.jsonl",
        {"question": "How many?", "answer": "5", "samples": ["It cannot be determined.", "<think>so 5"]},
    )
    assert entry(["prepare", str(data), "-o", str(tmp_path / "o.jsonl")]) == 2
    assert "nothing to train on: of 2 samples" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == [
        "a.jsonl"
    ]


def test_unreadable_samples_are_counted_and_shown(tmp_path, capsys):
    samples = ["2 + 3. The answer is 5.", "\\boxed{5}", *[f"It is {i} or 9." for i in range(7)]]
    data = write(tmp_path / "a.jsonl", {"id": "q", "question": "How many?", "answer": "5", "samples": samples})
    page = tmp_path / "page.html"
    assert (
        entry(["prepare", str(data), "-o", str(tmp_path / "o.jsonl"), "--json", "--show", "1", "--inspect", str(page)])
        == 0
    )
    out = capsys.readouterr()
    summary = json.loads(out.out)
    assert (summary["unreadable"], len(summary["unreadable_examples"]), summary["without_rationale"]) == (7, 5, 1)
    assert (
        summary["unreadable_examples"][0]["text"] == "It is 0 or 9."
        and "several" in summary["unreadable_examples"][0]["why"]
    )
    assert "vote: '5' (5: 2); gold: '5'" in out.err and "unreadable: several" in out.err
    (row,) = map(json.loads, (tmp_path / "o.jsonl").open(encoding="utf-8"))
    assert row["votes"] == {"5": 2} and row["positives"] == [{"text": "2 + 3.", "answer": "5"}]
    assert "It is 0 or 9." in page.read_text(encoding="utf-8")


def test_the_page_escapes_everything(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>\u202e"
    row = {
        "id": evil,
        "question": evil + " 2?",
        "answer": "5",
        "samples": [{"rationale": evil, "answer": "5", "source": evil}, evil],
    }
    page = tmp_path / "page.html"
    assert (
        entry(
            ["prepare", str(write(tmp_path / "a.jsonl", row)), "-o", str(tmp_path / "o.jsonl"), "--inspect", str(page)]
        )
        == 0
    )
    html = page.read_text(encoding="utf-8")
    assert (
        "<script" not in html
        and "<img" not in html
        and "&lt;script&gt;" in html
        and "http" not in html.replace("http-equiv", "")
    )
    assert 'name="viewport"' in html


def test_a_worked_gold_without_samples_is_a_positive(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {"question": "2 bags of 7?", "answer": "2*7=<<2*7=14>>14 nuts.\n#### 14"})
    assert (
        entry(["prepare", str(data), "-o", str(tmp_path / "o.jsonl")]) == 0
        and "own solutions" in capsys.readouterr().err
    )
    (question,) = load_questions(tmp_path / "o.jsonl").questions
    assert question.gold == "14" and question.positives == (Rationale("2*7=14 nuts.", "14", "gold"),)


@pytest.mark.parametrize("gold", [{}, {"answer": "12"}])
def test_german_samples_are_warned_of_and_read(tmp_path, capsys, gold):
    german = ["Das macht 10 + 2,50. So the total is 12,50 euros.", "12,50"]
    others = ["So it costs 12 euros.", "I count 1, 2 and 3.", "So the point is (3, 4)."]
    out = str(tmp_path / "o.jsonl")
    for samples, options, told in (
        (german + others, [], "2 of 5 samples' answers look like 1.234,5"),
        (german, [], "2 of 2 samples' answers look like 1.234,5"),
        (others, [], ""),
        (german, ["--decimal", "comma"], ""),
    ):
        data = write(tmp_path / "a.jsonl", {"question": "How much is it?", "samples": samples, **gold})
        code = entry(["prepare", str(data), "-o", out, *options])
        assert code == (2 if samples == german and not options else 0)
        err = capsys.readouterr().err
        assert told in err and ("--decimal comma" in err) == bool(told), err
    assert load_questions(out).questions[0].majority == "12.5"


def test_german_golds_are_warned_of_and_read(tmp_path, capsys):
    rows = [
        {
            "question": f"Wie viele sind {i} km?",
            "answer": f"{i}.000",
            "samples": [{"rationale": "x", "answer": f"{i}000"}],
        }
        for i in (3, 4)
    ]
    data = write(tmp_path / "a.jsonl", *rows)
    assert (
        entry(["prepare", str(data), "-o", str(tmp_path / "o.jsonl")]) == 0
        and "--decimal comma" in capsys.readouterr().err
    )
    assert entry(["prepare", str(data), "-o", str(tmp_path / "o.jsonl"), "--decimal", "comma"]) == 0
    assert "--decimal comma" not in capsys.readouterr().err
    assert [q.gold for q in load_questions(tmp_path / "o.jsonl").questions] == ["3000", "4000"]
