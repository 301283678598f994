"""How replies are read: where the answer stands, what it is worth, what is no answer, and what its rationale is."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcrd_fast.config import TASKS
from qcrd_fast.data.choices import parse_choices
from qcrd_fast.data.replies import Reader, read_reply
from qcrd_fast.data.schema import Rationale
from qcrd_fast.errors import InputError

OPTIONS = parse_choices("What cuts paper?\n(A) spoon\n(B) scissors\n(C) cushion")
PROPERTY = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def number(text: str) -> str | None:
    return read_reply(text, "number").answer


def choice(text: str) -> str | None:
    return read_reply(text, "choice", OPTIONS).answer


# Reasoning blocks


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>The answer is 9? No.</think>\nThe answer is 14.", "14"),
        ("<thinking>the answer is 9</thinking>\n\n14", "14"),
        ("<reasoning>9</reasoning><answer>14</answer>", "14"),
        ("so 9, the answer is 9.\n</think>\n\n14", "14"),
        ("<think>a <think>b</think> the answer is 9</think>\n14", "14"),
        ("<think>\n<think>\n9</think>14", "14"),
        (
            "<|channel|>analysis<|message|>the answer is 9<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is 14.<|return|>",
            "14",
        ),
        ("analysisWe get 9.assistantfinalThe answer is 14.", "14"),
        ("[THINK]the answer is 9[/THINK]It is 14.", "14"),
        ("◁think▷9◁/think▷14", "14"),
        ("<|begin_of_thought|>9<|end_of_thought|><|begin_of_solution|>\\boxed{14}<|end_of_solution|>", "14"),
        ("<think>the answer is 9, and", None),
        ("The answer is 14. <think>or is it", None),
        ("<|channel|>analysis<|message|>the answer is 9", None),
        ("analysisThe answer is 9", None),
        ("It is 14.<|im_end|>\n<|im_start|>user\nAnd 3?", "14"),
    ],
)
def test_reasoning_is_never_voted_on(text, answer):
    assert number(text) == answer


def test_thinking_is_the_rationale_where_there_is_no_other():
    own = "<think>two sevens</think>\nEach bag has 7, so 2 * 7 = 14.\nThe answer is 14."
    bare = "<think>two sevens</think>\n\\boxed{14}"
    assert [read_reply(text, "number").rationale for text in (own, bare)] == [
        "Each bag has 7, so 2 * 7 = 14.",
        "two sevens",
    ]
    for thinking, rationale in (
        ("drop", "Each bag has 7, so 2 * 7 = 14."),
        ("keep", "two sevens\n\nEach bag has 7, so 2 * 7 = 14."),
        ("only", "two sevens"),
    ):
        assert read_reply(own, "number", thinking=thinking).rationale == rationale
    assert read_reply(bare, "number", thinking="drop").rationale == ""
    sample = Rationale("<think>two sevens</think> It is twice seven.", "14")
    assert Reader().sample(sample, "number")[1:3] == ("It is twice seven.", "14")
    with pytest.raises(InputError, match="--thinking is one of"):
        read_reply(own, "number", thinking="some")


# Where the answer stands


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{14}", "so $\\boxed{\\text{14}}$.", "\\boxed{3} no, \\boxed{14}", "#### 14", "2*7\n#### 14 bags",
        "**Final Answer:** 14",
        "**Final Answer**\n\n14", "### Final Answer\n$14$", "Final Answer: The final answer is $14$. I hope it is "
        "correct.",
        "The answer is 14.", "The answer is: 14", "So the final answer is therefore 14 bags.", "Answer: 14",
        "*Answer*: **14**",
        "> Answer: 14", "Answer - 14", "The answer to the question is 14.", "The answer should be 14 because 2 * 7 = "
        "14.",
        "The answer is 14, since each of the 2 bags has 7.", "The answer is 14 (2 * 7).",
        "The answer is 14. This answer is right since 2 and 7.",
        "Die Antwort ist 14.", "Die richtige Antwort lautet 14 Taschen.", "Antwort: 14", "Endergebnis: 14",
        "La réponse est 14.",
        "La réponse finale est : 14", "Réponse : 14", "La respuesta es 14.", "La respuesta correcta es 14 bolsas.",
        "Respuesta final: 14",
        "La risposta è 14.", "Risposta: 14", "A resposta é 14.", "Resposta final: 14", "Ответ: 14",
        "Правильный ответ — 14.",
        "Ответ равен 14.",
        "答案是14。", "最终答案为：14个", "答：14", "答えは14個です。", "答え：14",
        "正解は14です。", '{"answer": 14}', '{"answer": "14"}',
        "There are 14.", "2 * 7 = 14 bags", "2 bags of 7 make 14.", "That gives 14 in all.", "14 are left.",
        "She gets 14.",
        "14 bags",
        "Es bleiben 14.", "Il reste 14 sacs.", "Quedan 14.",
        "Restano 14.", "Restam 14.", "Остаётся 14.", "共14个。", "残りは14個。",
        "Answer: Let's see. There are 2 bags of 7. So there are 14.", "Answer: 2 bags hold 7 each, which makes 14.",
        "The answer is 14.\n\nQ: And 3 bags?\nA: The answer is 21.", "The answer is 14.\nQuestion: 3 bags?\nAnswer: 21",
        "$$\n14\n$$", "\\[ 2 \\times 7 = 14 \\]", "First the answer is 3. No, the answer is 14.",
    ],
)  # fmt: skip
def test_the_answer_is_found(text):
    assert number(text) == "14"


@pytest.mark.parametrize(
    "text",
    [
        "", "It cannot be determined from the 2 facts.", "There is no answer: 2 facts are missing.",
        "Not enough information about the 7.",
        "Answer: 5-7", "Answer: $5-$7", "The answer is 5 or 6.", "The answer is 5 to 7 bags.",
        "The answer is between 5 and 7.", "Answer: 5:30",
        "The answer is 3 hours and 20 minutes.", "Answer: 5 ft 3 in", "\\boxed{\\sqrt{2}}", "\\boxed{2\\pi}",
        "Answer: 2x",
        "\\boxed{3 + 4}",
        "The answer is at least 5.", "The answer is not 5.", "The answer is 5, but let me check.",
        "If the answer is 5, then 6.",
        "Is the answer 5?", "The answer is 5?", "\\boxed{3} and \\boxed{4}", "\\boxed{14", "The answer is 3, 4.",
        "The answer is the 5th.",
        "3 + 4", "There are 2 bags with 7.", "Maybe there are 14.", "Answer:\n1. Add 3.\n2. Take 4 from 9.",
        "The wrong answer is 9.",
        "#### Step 2", "Die Antwort ist 5 oder 6.", "La réponse est 5 ou 6.", "La respuesta es 5 o 6.",
        "La risposta è 5 o 6.",
        "A resposta é 5 ou 6.", "Ответ: 5 или 6", "答案是5或6。",
        "答えは5または6です。", "答案不是5。", "无法确定，只有2个条件。",
        "Das lässt sich aus den 2 Angaben nicht sagen.", "No se puede saber con 2 datos.",
    ],
)  # fmt: skip
def test_a_doubt_is_no_answer(text):
    reading = read_reply(text, "number")
    assert reading.answer is None and reading.why


@pytest.mark.parametrize("task", ["number", "math"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The number of nuts in 3 bags is 12.", "12"), ("So the cost of 3 apples is $12.", "12"),
        ("So the cost of 3 apples is US$12.", "12"), ("So the 3 friends get **12**.", "12"),
        ("So the 3 children were given 12 sweets.", "12"), ("After 3 days there are 12 left.", "12"),
        ("So the width of the 3 rooms is then about 12 meters.", "12"), ("So 3 bags hold a total of 12.", "12"),
        ("Adding 3 and 4 gives us 12.", "12"), ("Each of the 3 quarters is worth 12 cents.", "12"),
        ("The 3 boxes hold 4 each, which makes a combined weight of 12 kg.", "12"),
        ("So the change over 3 days is -12.", "-12"), ("There were 3 boys, so the girls are in 12 groups.", "12"),
        ("Le prix de 3 pommes est de 12 euros.", "12"), ("Für 3 Kuchen sind es insgesamt 12.", "12"),
        ("3つの袋の合計は全部で12個です。", "12"), ("В 3 мешках всего 12 яблок.", "12"), ("14 are left.", "14"),
        ("He has 3 and gets 9. The sum is therefore 3 and 9 with Total customers: 12", "12"),
        ("He has $3 and earns $9, so the total is $12.", "12"), ("She earns $3 + $9 = $12.", "12"),
    ],
)  # fmt: skip
def test_the_complement_of_the_last_verb_is_the_answer(text, answer, task):
    assert read_reply(f"We think. {text}", task).answer == answer


@pytest.mark.parametrize("task", ["number", "math"])
@pytest.mark.parametrize(
    "text",
    [
        "Therefore, 36 eggs are needed for 3 cakes.", "36 eggs are used in the 3 cakes.",
        "5 * 8 = 40, so 40 pages are read in 5 days.", "So 12 apples are left in the 3 bags.",
        "So $20 is left for 2 weeks.", "So 5 are red out of 12.", "Thus 3 are left of the 12.",
        "She earns $10 an hour, so $80 is earned in 8 hours.", "So 5 sweets are given to each of the 4 friends.",
        "There are 42 eggs in 7 boxes.", "12 is the total number of 3 bags.", "12 is the total of 3 bags.",
        "36 is a multiple of 12.",
        "There are 16 people on the bus, which is below its limit of 36.",
        "Therefore, Todd had 38 pieces before Steve gave him 16 more.",
        "Donc 36 œufs sont nécessaires pour 3 gâteaux.",
    ],
)  # fmt: skip
def test_the_last_verb_of_a_number_decides_nothing(text, task):
    assert read_reply(f"We think. {text}", task).answer is None


def test_a_cut_reply_needs_an_announced_answer():
    assert read_reply("First 3 + 4 = 7", "number", truncated=True).answer is None
    assert read_reply("3 + 4. The answer is 7.", "number", truncated=True).answer == "7"


# What it is worth


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("\\frac{1}{2}", "0.5"), ("\\dfrac12", "0.5"), ("\\frac1{2}", "0.5"), ("-\\tfrac{3}{4}", "-0.75"),
        ("3\\frac{1}{2}", "3.5"),
        ("2{,}250", "2250"), ("2\\,250", "2250"), ("2\\;250", "2250"), ("2\u2009250", "2250"), ("2\u202f250", "2250"),
        ("2,250", "2250"),
        ("2'250", "2250"), ("2 \\times 10^5", "200000"), ("2 \\cdot 10^{5}", "200000"), ("2e5", "200000"),
        ("10^{-3}", "0.001"),
        ("3 1/2", "3.5"), ("3½", "3.5"), ("½", "0.5"), ("25\\%", "25"), ("25 percent", "25"), ("\\$18.50", "18.5"),
        ("€18", "18"),
        ("USD 18", "18"), ("18 dollars", "18"), ("３２", "32"), ("٣٢", "32"), ("-3", "-3"), ("−3", "-3"),
        ("negative 3", "-3"),
        ("minus 3", "-3"), ("2.5 million", "2500000"), ("3 thousand", "3000"), ("3万", "30000"), ("1.2亿", "120000000"),
        ("2 Mio.", "2000000"),
        ("90^\\circ", "90"), ("18 \\text{ cm}^2", "18"), ("18 km/h", "18"), ("x = 18", "18"), ("2 * 9 = 18", "18"),
        ("3 and a half", "3.5"),
        ("\\mathbf{18}", "18"), ("\\(18\\)", "18"), ("{18}", "18"), ("(18)", "18"), ("«18»", "18"), ("100/4", "25"),
        ("1 234 567", "1234567"),
    ],
)  # fmt: skip
def test_numbers_in_any_writing(written, value):
    assert number(f"\\boxed{{{written}}}") == value
    assert number(f"That is easy. The answer is {written}.") == value
    assert Reader().answer(written, "number")[0] == value


@pytest.mark.parametrize(
    ("written", "value"),
    [("3.000", "3000"), ("3 000", "3000"), ("3,5", "3.5"), ("1.234,56", "1234.56"), ("3{,}5", "3.5")],
)
def test_decimal_commas(written, value):
    assert read_reply(f"Die Antwort ist {written}.", "number", decimal="comma").answer == value
    with pytest.raises(InputError, match="--decimal is one of point, comma"):
        read_reply("1", "number", decimal="dot")


@pytest.mark.parametrize(
    "text",
    [
        "B", "(B)", "B.", "[B]", "**B**", "(b)", "option B", "Option (B)", "B) scissors", "B: scissors", "B - scissors",
        "scissors", "Scissors.",
        "\\boxed{B}", "\\boxed{\\text{(B)}}", "\\boxed{\\textbf{B}}", "\\boxed{\\text{scissors}}", "The answer is B.",
        "The answer is (B) because it cuts.",
        "The correct option is B.", "Option B is correct.", "So I choose (B).", "The answer is option B.",
        "Answer: **(B)**",
        "The answer is scissors.", "The answer is the scissors.", "（B）",
        "【B】", "答案是B。", "故选B。", "正确答案是（B）", "答えはBです。",
        "Die Antwort ist B.",
        "La réponse est (B).", "La respuesta correcta es la opción B.", "La risposta corretta è B.",
        "A resposta é a letra B.", "Ответ: B",
        "One needs something sharp. So scissors.", "(A) is dull.\nTherefore, the best answer is (B).",
    ],
)  # fmt: skip
def test_options_in_any_wording(text):
    assert choice(text) == "scissors"


@pytest.mark.parametrize(
    "text",
    [
        "(A) and (B)",
        "The answer is A or B.",
        "A/B",
        "Answer: D",
        "not (a)",
        "B) cushion",
        "(A) is wrong.",
        "spoon or cushion",
        "None of them",
    ],
)
def test_no_single_option_is_no_answer(text):
    assert choice(text) is None


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Which? Options: (A) x (B) y (C) z", ("x", "y", "z")), ("Which? A: x, B: y, or C: z", ("x", "y", "z")),
        ("Which?\n- A: x\n- B: y", ("x", "y")),
        ("Which?\n1. x\n2. y", ("x", "y")), ("Which? A. x B. y", ("x", "y")), ("Which?（A）x（B）y", ("x", "y")),
        ("Which?\n[A] x\n[B] y", ("x", "y")),
        ("Facts:\n1. Tom has 3.\n2. Ann has 4.\nHow many?", ()), ("Is plan B. good?", ()),
    ],
)  # fmt: skip
def test_options_on_the_questions_own_lines(question, found):
    assert parse_choices(question) == found


def test_numbered_options_are_named_by_their_numbers():
    options = parse_choices("Which?\n1. spoon\n2. scissors")
    assert [read_reply(t, "choice", options).answer for t in ("The answer is 2.", "(2)", "option 2", "3")] == [
        "scissors"
    ] * 3 + [None]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes.", "yes"), ("The answer is no.", "no"), ("Cats swim.\nAnswer: True", "yes"), ("\\boxed{\\text{No}}", "no"),
    ("Yes, cats swim. They do.", "yes"),
     ("So it is false.", "no"), ("Die Antwort ist ja.", "yes"), ("答案是否。", "no"), ("There is no evidence.", None),
     ("Yes and no.", None)],
)  # fmt: skip
def test_yes_and_no(text, answer):
    assert read_reply(text, "yes-no").answer == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("The answer is $\\frac{3}{2}$.", "1.5"), ("So \\boxed{(1, 2]}", "(1, 2]"), ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}"),
    ("The answer is $x^2 + 1$.", "x^2 + 1"),
     ("Let us see what follows from that.", None)],
)  # fmt: skip
def test_formulas(text, answer):
    assert read_reply(text, "math").answer == answer


@pytest.mark.parametrize(
    ("text", "rationale"),
    [
        ("2 * 7 = 14.\nSo the answer is 14.", "2 * 7 = 14."), ("2 * 7 = 14, 答案是14。", "2 * 7 = 14"),
        ("The answer is 14. Each bag has 7.", "Each bag has 7."),
        ("Two bags of 7, so 2 * 7 = \\boxed{14}.", "Two bags of 7, so 2 * 7 = 14."),
        ("Two sevens.\nThe answer is $\\boxed{14}$.", "Two sevens."),
        ("2 * 7 = 14", "2 * 7 = 14"), ("14", ""), ("\\boxed{14}", ""), ("Answer: 14", ""),
        ("Two sevens.\n#### 14", "Two sevens."),
    ],
)  # fmt: skip
def test_the_rationale_ends_where_the_answer_is_announced(text, rationale):
    assert read_reply(text, "number").rationale == rationale


def test_a_worked_gold():
    reading = Reader().solution("Each has 7. 2*7=<<2*7=14>>14\n#### 14", "number")
    assert reading and (reading.rationale, reading.answer) == ("Each has 7. 2*7=14", "14")
    assert Reader().solution("14", "number") is None


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    reader = Reader.from_options(answer_regex=r"result=(\S+)")
    assert reader.read("the answer is 3; result=14", "number").answer == "14"
    assert reader.read("the answer is 3", "number").answer is None
    assert reader.answer("3", "number")[0] == "3"  # a gold
    assert reader.read("result=1", "number", truncated=True).answer is None  # of 14
    assert reader.read("result=4, then result=1", "number", truncated=True).answer is None
    assert reader.read("result=14 and", "number", truncated=True).answer == "14"
    (tmp_path / "my_reader_module.py").write_text(
        "def last(text, task, choices):\n    return text.split()[-1] if text else 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    reader = Reader.from_options(answer_reader="my_reader_module:last")
    assert reader.read("it is not 3 but 14", "number").answer == "14"
    with pytest.raises(InputError, match="--answer-reader: ZeroDivisionError"):
        reader.read("", "number")
    for options, says in (
        ({"answer_regex": "("}, "no regular expression"), ({"answer_reader": "nothing"}, "MODULE:FUNCTION"),
        ({"answer_reader": "no_such_module_here:f"}, "cannot be loaded"), ({"tolerance": "-1"}, "at least 0"),
        ({"tolerance": "x"}, "at least 0"),
        ({"answer_regex": "a", "answer_reader": "b:c"}, "one of them"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(says)):
            Reader.from_options(**options)


# Properties

values = st.one_of(st.integers(-9999, 99_999).map(str), st.decimals(0, 999, places=2).map(str))
wrappings = st.sampled_from(
    ("{}", "**{}**", "${}$", "\\({}\\)", "\\text{{{}}}", "`{}`", "{} apples", "\\mathrm{{{}}}", "${}$ apples")
)
wordings = st.sampled_from(
    ("The answer is {}.", "Answer: {}", "**Answer:** {}", "#### {}", "Final Answer: {}", "So the final answer is {}",
    "Die Antwort ist {}.", "Antwort: {}",
     "La réponse est {}.", "La respuesta es {}.", "La risposta è {}.",
     "A resposta é {}.", "Ответ: {}", "答案是{}。", "答えは{}です。",
     "The correct answer is: {}",
     "The answer is {} because 2 + 2 = 4.", "The answer is {}.\n\nQ: What is 5?\nA: The answer is 5.")
)  # fmt: skip
befores = st.sampled_from(
    (
        "",
        "There are 3 and 5 of them.\n",
        "<think>the answer is 77</think>\n",
        "Maybe 3? No. ",
        "First the answer is 3.\nNo: ",
    )
)


@PROPERTY
@given(value=values, wrapping=wrappings, wording=wordings, before=befores)
def test_a_known_answer_is_read_in_any_wording(value, wrapping, wording, before):
    expected = Reader().answer(value, "number")[0]
    assert number(before + wording.format(wrapping.format(value))) == expected
    assert number(f"{before}So \\boxed{{{value}}}") == expected


nothings = st.sampled_from(
    ("It cannot be determined.", "The answer is unknown.", "I do not know.", "There is not enough information.",
    "The answer is {a} or {b}.",
     "Answer: {a}-{b}", "Answer: {a}:{b}",
     "<think>so {a}, the answer is {a}", "Die Antwort ist {a} oder {b}.", "答案是{a}或{b}。",
     "\\boxed{{{a} + {b}}}",
     "The answer is between {a} and {b}.", "The answer is {a} hours and {b} minutes.", "Are there {a} or {b}?",
     "\\boxed{{{a}\\sqrt{{{b}}}}}")
)  # fmt: skip


@PROPERTY
@given(
    a=st.integers(11, 59),
    b=st.integers(11, 59),
    text=nothings,
    before=st.sampled_from(("", "There are {a} of {b}.\n", "2 + 2 = 4.\n")),
)
def test_a_reply_without_an_answer_reads_as_none(a, b, text, before):
    if a == b:
        b += 1
    assert number((before + text).format(a=a, b=b) if "{" in before else before + text.format(a=a, b=b)) is None


@PROPERTY
@given(
    letter=st.sampled_from("ABC"),
    form=st.sampled_from(("({})", "{}", "**{}**", "option {}", "\\boxed{{{}}}", "[{}]", "({}) {}", "{}. {}")),
    wording=wordings,
)
def test_a_known_option_is_read_in_any_wording(letter, form, wording):
    said = form.format(letter, OPTIONS["ABC".index(letter)])
    assert choice(wording.format(said)) == OPTIONS["ABC".index(letter)]


HOSTILE = {
    "braces": "\\boxed" + "{" * 1_000_000, "fractions": "\\boxed{" + "\\frac{" * 150_000,
    "digits": "The answer is " + "9" * 1_000_000,
    "tags": "<think>" * 140_000, "closed": "</think>" * 125_000, "unclosed": "<think" * 160_000,
    "markers": "The answer is " * 70_000,
    "labels": "Answer: " * 120_000, "spaces": "The answer is" + " " * 1_000_000 + "5", "lines": "\n" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "boxes": "\\boxed{5}" * 110_000, "dollars": "$" * 1_000_000, "parentheses": "(" * 1_000_000, "sums": "1+" * 500_000,
    "stars": "*" * 1_000_000,
    "options": "(A) " * 250_000, "hashes": "#### " * 200_000, "chinese": "答案" * 300_000, "ends": "<|end|>" * 140_000,
    "dots": ". " * 500_000,
}  # fmt: skip


@pytest.mark.parametrize("size", [200_000, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_reply_ends(kind, size):
    """Megabytes of them; a fifth of one is long enough for what takes the square of its length."""
    process = multiprocessing.get_context("fork").Process(target=read_as_every_task, args=(HOSTILE[kind][:size],))
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0


def read_as_every_task(text):
    for task in TASKS:
        read_reply(text, task, parse_choices(text) if task == "choice" else ())


def test_no_torch_no_numpy():
    modules = "import json, sys, qcrd_fast.data.replies, qcrd_fast.data.inspection"
    code = f"{modules}; print(json.dumps([m for m in ('torch', 'numpy', 'jinja2') if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Therefore, there are **18** jars.", "18"), ("Also ist die Antwort 18.", "18"), ("答：一共有18个苹果。", "18"),
        ("3×6=18（个）", "18"),
        ("$$x = \\frac{36}{2} = 18$$", "18"), ("It is 5 or more.", None), ("The answer is 1/3 or 0.33.", None),
        ("\\boxed{(1,2)}", None),
        ("The answer is 18 rather than 9.", None), ("Let the answer be x. Then x = 18.", "18"),
    ],
)  # fmt: skip
def test_more_numbers(text, answer):
    assert number(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "Ｂ",
        "[[B]]",
        "La bonne réponse est la B.",
        "La opción correcta es B.",
        "L'opzione corretta è B.",
        "B is the correct answer.",
    ],
)
def test_more_options(text):
    assert choice(text) == "scissors"


@pytest.mark.parametrize(
    "text",
    [
        "```think\nthe answer is 9\n```\nIt is 14.", "```reasoning\n9\n```\n\\boxed{14}",
        "&lt;think&gt;so 9&lt;/think&gt;\n14",
        "<cot>the answer is 9</cot>\nThe answer is 14.", "<Thinking>9</Thinking><Answer>14</Answer>",
        "<ANSWER>14</ANSWER>",
        "<final_answer>14</final_answer>", "<b>14</b>", "<p>The answer is <strong>14</strong>.</p>",
        "It is <span>14</span>.<br/>",
        "<s>14</s>", "<pad><pad> 14</s>", "<bos>The answer is 14.<eos>",
        "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\nIt is 14.<|eot_id|>",
        "<|im_start|>assistant\n14<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n14<|im_end|>",
        "<|START_THINKING|>9<|END_THINKING|><|START_RESPONSE|>14<|END_RESPONSE|>",
        "<think>9</think><|im_end|>\n<|im_start|>assistant\n14", "<div>2 * 7 = 14</div>",
    ],
)  # fmt: skip
def test_tags_fences_and_tokens(text):
    assert number(text) == "14"


def test_a_fence_of_reasoning_without_its_end_is_cut():
    assert number("```think\nthe answer is 9") is None and number("```python\nprint(14)\n```\nIt is 14.") == "14"


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("math", "The answer is $7$ or $8$.", None), ("math", "The answer is $7$ thousand.", None),
        ("math", "The answer is not $7$.", None), ("math", "The answer is at most $7$.", None),
        ("math", "So $y = 7$.", "7"), ("math", "The answer is $\\sqrt{7}$ because of that.", "\\sqrt{7}"),
        ("math", "The answer is unknown.", None), ("math", "The answer is $7$ cm.", "7"),
        ("text", "The answer is not Oslo.", None), ("text", "It cannot be determined.", None),
        ("text", "The answer is Oslo because it is cold.", "Oslo"),
        ("text", "La réponse est Oslo parce que c'est froid.", "Oslo"),
        ("text", "The answer is Mr. Brown.", "Mr. Brown"), ("text", "The answer is A. B. Cole.", "A. B. Cole"),
        ("text", "答案是「東京」。", "東京"), ("text", "答えは東京です。", "東京"),
        ("text", "The answer is hard to say.", None),
        ("text", "The answer is Oslo, not Bergen.", "Oslo"), ("text", "Answer:\n- Oslo\n- Bergen", None),
    ],
)  # fmt: skip
def test_formulas_and_texts_among_words(task, text, answer):
    assert read_reply(text, task).answer == answer


@pytest.mark.parametrize(
    ("text", "rationale"),
    [
        ("2 * 7 = 14. We conclude that the answer is 14.", "2 * 7 = 14."),
        ("2 * 7 = 14. Somit ist die Antwort 14.", "2 * 7 = 14."),
        ("The answer is 14, as each bag has 7.", "The answer is 14, as each bag has 7."),
        ("Answer: 14\n2*7=14", "2*7=14"),
        ("2 * 7 = 14. So the number of all bags is \\boxed{14}.", "2 * 7 = 14."),
        ('{"rationale": "2*7", "answer": 14}', "2*7"),
        ("2 * 7 = 14. La réponse est donc 14.", "2 * 7 = 14."),
        ('```json\n{"answer": "14", "steps": ["a", "b"]}\n```', "a\nb"),
    ],
)  # fmt: skip
def test_the_rationale_is_cut_at_whole_sentences(text, rationale):
    reading = read_reply(text, "number")
    assert (reading.answer, reading.rationale) == ("14", rationale)


def test_a_closing_option_is_no_rationale():
    assert read_reply("Blades cut. Option B is correct.", "choice", OPTIONS).rationale == "Blades cut."
    assert read_reply("Fish swim. Yes.", "yes-no").rationale == "Fish swim."


# What stands around an announcement


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is \\boxed{18}.", "18"), ("We get -\\boxed{18}.", "-18"),
        ("That is minus $\\boxed{18}$ degrees.", "-18"),
        ("\\boxed{18} thousand", "18000"), ("$\\boxed{1.8} \\times 10^{3}$", "1800"),
        ("\\boxed{18} jars in all.", "18"),
        ("\\textbf{So \\boxed{18}}", "18"), ("Step one gives \\boxed{4}. Then \\boxed{18}.", "18"),
        ("\\boxed{4} wait, \\boxed{18}", "18"),
        ("If a box holds 6, three hold \\boxed{18}.", "18"), ("\\boxed{18} is the answer.", "18"),
        ("It cannot be \\boxed{18}.", None), ("Das ist nicht \\boxed{18}.", None), ("n \\le \\boxed{18}", None),
        ("She has more than \\boxed{18}.", None), ("Mindestens \\boxed{18}", None), ("$\\sqrt{\\boxed{18}}$", None),
        ("$\\dfrac{1}{\\boxed{18}}$", None), ("$2^{\\boxed{18}}$", None), ("$3 + \\boxed{18}$", None),
        ("$\\boxed{18}y$", None),
        ("\\boxed{18} weeks and 2 days", None), ("\\boxed{18} or 19", None),
        ("Would it be \\boxed{18}? It would not.", None),
        ("\\boxed{18} red and \\boxed{4} blue jars", None), ("$a=\\boxed{18}$; $b=\\boxed{4}$", None),
        ("\\boxed{18} \\qquad \\boxed{4}", None), ("$\\boxed{9 + 9} = \\boxed{18}$", "18"),
        ("\\boxed{18} and again \\boxed{18}", "18"),
    ],
)  # fmt: skip
def test_what_stands_around_a_box(text, answer):
    assert number(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 9. Wait, 3 * 6 = 18.", "The answer is 9.\n\nHmm, that is wrong.", "Answer: 9\nNo, 18.",
        "The answer is 9, I mean 18.",
        "The answer is 9 - sorry, 18.", "#### 9\nLet me recompute: 18.", "The answer is 9. Oops, I forgot 9.",
        "Die Antwort ist 9. Moment, das stimmt nicht.", "La réponse est 9. Attends, 18.", "La respuesta es 9. Espera, "
        "es 18.",
        "La risposta è 9. Aspetta, 18.", "A resposta é 9. Espere, 18.", "Ответ: 9. Подожди, 18.",
        "答案是9。等等，不对，18。",
        "答えは9です。いや、18です。",
        "I do not believe the answer is 9.", "Ann says that the answer is 9.",
        "A common error is that the answer is 9.",
        "It would be wrong to claim that the answer is 9.", "The answer is 9, which is incorrect.", "The answer 9 is "
        "wrong.",
        "The answer is 9 is false.", "Es stimmt nicht, dass die Antwort 9 ist.", "Falls die Antwort 9 ist, ist sie "
        "klein.",
        "La réponse n'est pas 9.", "La respuesta no es 9.", "La risposta non è 9.", "A resposta não é 9.",
        "Ответ не 9.",
        "The answer is rounded to 2 decimals.", "The answer is on line 9.", "The answer is 9 when there are 3 bags.",
        "The answer is triple 9.", "The answer is the cube root of 27.", "La réponse est le double de 9.",
    ],
)  # fmt: skip
def test_an_announcement_that_does_not_stand(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 9. Wait, that is wrong. The answer is 18.", "18"), ("I think that the answer is 18.", "18"),
        ("He did not eat any, so the answer is 18.", "18"), ("The answer is that 18 are left.", "18"),
        ("So 18 is the answer.", "18"),
        ("Ann says she has 9 more, so the answer is 18.", "18"), ("The box is not full, so there are 18.", "18"),
        ("The answer is the number of bags times 9: 2 * 9 = 18.", "18"), ("Either way we get an answer of 18.", "18"),
        ("The answer is still 18.", "18"),
    ],
)  # fmt: skip
def test_an_announcement_that_stands(text, answer):
    assert number(text) == answer
