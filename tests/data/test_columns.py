"""What the columns of a row mean: reasoning, flags, options, labels and golds that may be taken for something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcrd_fast.data.choices import with_choices
from qcrd_fast.data.load import load_questions, prepare
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError

JARS = "A crate holds 6 jars. How many jars are in 3 crates?"
RIGHT, WRONG = "Six and six and six. Answer: 18", "Three more than six. Answer: 9"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    return load_questions(write(tmp_path / "rows.jsonl", list(rows)), **options)


def only(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Question:
    (question,) = load(tmp_path, *rows, **options).questions
    return question


def texts(question: Question) -> tuple[list[str], list[str]]:
    return [r.text for r in question.positives], [r.text for r in question.negatives]


# Reasoning is never voted on

OPEN = {
    "samples": [
        {
            "question": JARS,
            "samples": [
                {"content": None, "reasoning_content": "So 3 + 6 = 9"},
                {"content": None, "reasoning": "Then 6 + 3 = 9"},
                {"content": RIGHT, "reasoning_content": "well"},
            ],
        }
    ],
    "rows": [
        {"question": JARS, "reasoning_content": "So 3 + 6 = 9", "response": None},
        {"question": JARS, "thinking": "So 3 + 6 = 9, or more", "response": None},
        {"question": JARS, "reasoning_content": "It is 9.", "response": RIGHT},
    ],
}


@pytest.mark.parametrize("shape", OPEN)
def test_reasoning_that_came_to_no_reply_is_unreadable(shape: str, tmp_path: Path) -> None:
    result = load(tmp_path, *OPEN[shape])
    assert result.summary.unreadable == 2 and result.questions[0].votes == {"18": 1}
    assert texts(result.questions[0]) == (["Six and six and six."], [])


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
def test_the_answer_beside_reasoning_is_the_reply(key: str, tmp_path: Path) -> None:
    rows = [{"prompt": JARS, key: "I say 3 + 6 = 9", "answer": a} for a in (RIGHT, "18", WRONG)]
    question = only(tmp_path, *rows)
    assert question.gold is None and question.votes == {"18": 2, "9": 1} and question.task == "number"
    assert texts(question) == (["Six and six and six.", "I say 3 + 6 = 9"], ["Three more than six."])
    told = {"messages": [{"role": "user", "content": JARS}], key: "It is 9.", "answer": RIGHT}
    assert only(tmp_path, told).majority == "18"
    assert only(tmp_path, {"question": JARS, "ground_truth": "18", key: "3 + 6", "answer": "9"}).gold == "18"


@pytest.mark.parametrize("key", ["rationale", "explanation", "solution"])
def test_an_explanation_of_the_gold_is_not_of_the_reply(key: str, tmp_path: Path) -> None:
    result = load(
        tmp_path, {"question": JARS, "answer": "18", key: "Three crates of six jars make 18.", "response": WRONG}
    )
    assert texts(result.questions[0]) == (["Three more than six."], [])
    row = {"question": JARS, "answer": "18", "notes": "Three crates of six.", "response": "Answer: 18"}
    assert texts(only(tmp_path, row, mapping="rationale=notes")) == (["Three crates of six."], [])


def test_parts_of_type_thinking_are_reasoning(tmp_path: Path) -> None:
    parts = [{"type": "thinking", "thinking": "3 + 6 is 9"}, {"type": "text", "text": RIGHT}]
    row = {"messages": [{"role": "user", "content": JARS}, {"role": "assistant", "content": parts}]}
    assert texts(only(tmp_path, row)) == (["Six and six and six."], [])
    row["messages"][1]["content"] = parts[:1]  # type: ignore[index]
    assert load(tmp_path, row).summary.unreadable == 1


# Replies that were cut

CUT = "First we add 3 and 6 = 9"
CUTS: dict[str, list[dict[str, Any]]] = {
    "outputs": [
        {
            "prompt": JARS,
            "outputs": [{"text": RIGHT, "finish_reason": "stop"}, {"text": CUT, "finish_reason": "length"}],
        }
    ],
    "choices": [
        {
            "prompt": JARS,
            "choices": [
                {"message": {"content": RIGHT}, "finish_reason": "stop"},
                {"message": {"content": CUT}, "finish_reason": "length"},
            ],
        }
    ],
    "completions": [
        {
            "prompt": JARS,
            "choices": [{"text": RIGHT, "finish_reason": "stop"}, {"text": CUT, "finish_reason": "length"}],
        }
    ],
    "own": [{"question": JARS, "samples": [{"rationale": RIGHT}, {"rationale": CUT, "cut": True}]}],
    "rows": [
        {"question": JARS, "response": RIGHT, "truncated": False},
        {"question": JARS, "response": CUT, "truncated": True},
    ],
    "a column": [{"problem": JARS, "generations": [RIGHT, CUT], "finish_reasons": ["stop", "length"]}],
    "messages": [
        {"messages": [{"role": "user", "content": JARS}, {"role": "assistant", "content": text}], "finish_reason": why}
        for text, why in ((RIGHT, "stop"), (CUT, "max_tokens"))
    ],
}


@pytest.mark.parametrize("shape", CUTS)
def test_of_a_cut_reply_only_an_announced_answer_counts(shape: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", CUTS[shape])
    summary, _ = prepare(path, tmp_path / "out.jsonl")  # through the spool
    assert summary.unreadable == 1 and "cut at its maximum length" in summary.unreadable_examples[0]["why"]
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["votes"] == {"18": 1} and row["positives"] == [{"text": "Six and six and six.", "answer": "18"}]
    assert not {"finish_reason", "finish_reasons", "truncated"} & summary.keys_not_read.keys()


def test_a_reply_that_was_cut_before_it_said_anything_is_unreadable(tmp_path: Path) -> None:
    for said in ({"content": None}, {"message": {"role": "assistant", "content": None}}):
        result = load(tmp_path, {"question": JARS, "samples": [{**said, "finish_reason": "length"}, RIGHT]})
        assert result.summary.unreadable == 1 and result.questions[0].votes == {"18": 1}


def test_a_cut_batch_reply(tmp_path: Path) -> None:
    asked = write(
        tmp_path / "in.jsonl", [{"custom_id": "a", "body": {"messages": [{"role": "user", "content": JARS}]}}]
    )
    choices = [{"message": {"content": text}, "finish_reason": why} for text, why in ((RIGHT, "stop"), (CUT, "length"))]
    row = {"custom_id": "a", "response": {"status_code": 200, "body": {"choices": choices}}}
    assert load(tmp_path, row, batch_input=asked).summary.unreadable == 1


def test_an_answer_at_which_a_reply_was_cut_may_not_be_whole(tmp_path: Path) -> None:
    for text, read in (
        ("Six thrice, so the answer is 1", 0),
        ("So the answer is 18 because six jar", 1),
        ("Well.\nAnswer: 18", 1),
        (r"So \boxed{18}", 1),
    ):
        row = {"prompt": JARS, "outputs": [{"text": RIGHT}, {"text": text, "finish_reason": "length"}]}
        assert only(tmp_path, row, task="number").votes == {"18": 1 + read}


# Preference pairs


def test_a_rejected_reply_does_not_stand_in_for_an_unreadable_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": JARS, "answer": "18", "chosen": "There are quite a few of them.", "rejected": WRONG},
        {
            "prompt": "Ida ate 2 of 9. How many are left?",
            "answer": "7",
            "chosen": "Answer: 7",
            "rejected": "Or. Answer: 11",
        },
    ]
    first, second = load(tmp_path, *rows).questions
    assert (first.majority, first.positives, first.negatives) == (None, (), ()) and second.majority == "7"
    by_gold, _ = load(tmp_path, *rows, split_by="gold").questions
    assert by_gold.majority is None and texts(by_gold) == ([], ["Three more than six."])
    more = {"question": JARS, "response": RIGHT}
    files = [write(tmp_path / "pairs.jsonl", rows[:1]), write(tmp_path / "more.jsonl", [more])]
    assert texts(load_questions(files).questions[0]) == (["Six and six and six."], ["Three more than six."])
    with pytest.raises(InputError, match="nothing to train on"):
        prepare(write(tmp_path / "none.jsonl", [{**rows[0], "answer": None}]), tmp_path / "o", task="number")


# Options, labels and golds

OPTIONS = ["oven", "train", "pillow"]
COLUMNS = {
    "A B C": "ABC",
    "option_a": ["option_a", "option_b", "option_c"],
    "optionA": ["optionA", "optionB", "optionC"],
    "choice_a": ["choice_a", "choice_b", "choice_c"],
    "answerA": ["answerA", "answerB", "answerC"],
}


@pytest.mark.parametrize("shape", COLUMNS)
@pytest.mark.parametrize("more", [{}, {"samples": ["It carries. Answer: B"]}, {"response": "It carries. Answer: (B)"}])
def test_option_columns_are_choices(shape: str, more: dict[str, Any], tmp_path: Path) -> None:
    question = only(
        tmp_path, {"question": "Which?", **dict(zip(COLUMNS[shape], OPTIONS, strict=True)), "answer": "B", **more}
    )
    assert question.question == "Which?\nAnswer Choices:\n(a) oven\n(b) train\n(c) pillow"
    assert question.gold == "train" and (question.majority == "train" or not more)


def test_a_blank_option_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,A,B,C,D,answer,response\nWhich?,oven,,train,pillow,C,It carries. Answer: C\n")
    (question,) = load_questions(path).questions
    assert "(c) train" in question.question and question.gold == question.majority == "train"
    path.write_text(
        "question,option1,option2,option3,answer,response\nWhich?,oven,train,None,2,It carries. Answer: 2\n"
    )
    (question,) = load_questions(path).questions
    assert question.question.endswith("(1) oven\n(2) train\n(3) None") and question.gold == question.majority == "train"


@pytest.mark.parametrize("labels", ["BCD", "ACD", "FGH", "FGJ", "123", "ABC"])
def test_a_letter_is_the_row_s_own_label(labels: str, tmp_path: Path) -> None:
    said = [
        f"It carries. The answer is ({labels[1]}).",
        f"Soft. The answer is {labels[2]}.",
        f"Warm. Answer: {labels[1]}",
    ]
    for key in ("choices", "options"):
        value = (
            {"text": OPTIONS, "label": list(labels)} if key == "choices" else dict(zip(labels, OPTIONS, strict=True))
        )
        question = only(tmp_path, {"question": "Which?", key: value, "answer": labels[1], "generations": said})
        assert question.gold == "train" and question.votes == {"train": 2, "pillow": 1}


@pytest.mark.parametrize(
    ("options", "labels", "gold", "text"),
    [
        (["2", "4", "1", "3"], ["1", "2", "3", "4"], "2", "(2) 4"),  # 4 alone could be the fourth
        (["2", "4", "1", "3"], [1, 2, 3, 4], 2, "(2) 4"),
        (["2", "14", "1", "3"], ["1", "2", "3", "4"], "2", "14"),
        (["C", "A", "B", "D"], ["A", "B", "C", "D"], "A", "(a) C"),
        (["C", "A", "B", "D"], ["A", "B", "C", "D"], "D", "D"),
        (["oven", "train"], ["A", "B"], "b", "train"),
        (["oven", "train"], ["A", "B"], "oven", "oven"),
        (["oven", "train"], ["A", "B"], 1, "train"),
    ],
)
def test_where_there_are_labels_the_gold_is_one(
    options: Any, labels: Any, gold: Any, text: str, tmp_path: Path
) -> None:
    row = {"question": "Which?", "choices": {"text": options, "label": labels}, "answerKey": gold}
    assert only(tmp_path, row).gold == text
    assert only(tmp_path, {**row, "samples": ["x"]}).gold == text


@pytest.mark.parametrize(
    "cell",
    [
        "a ) oven , b ) train , c ) pillow",
        "A. oven\nB. train\nC. pillow",
        "(A) oven (B) train (C) pillow",
        "1. oven\n2. train\n3. pillow",
        "['oven', 'train', \"pillow\"]",
        "['oven' 'train' 'pillow']",
        "{'text': array(['oven', 'train', 'pillow'], dtype=object), 'label': array(['A', 'B', 'C'], dtype=object)}",
        "{'A': 'oven', 'B': 'train', 'C': 'pillow'}",
    ],
)
def test_choices_as_text(cell: str, tmp_path: Path) -> None:
    question = only(tmp_path, {"question": "Which?", "options": cell, "response": "It carries. Answer: train"})
    assert [line[4:] for line in question.question.splitlines()[2:]] == OPTIONS and question.majority == "train"


@pytest.mark.parametrize(
    "cell", ["oven, train", "a) oven, c) train", "{'text': ['oven' 'train'], 'label': ['A' 'B']}", "[oven"]
)
def test_choices_in_unclear_text_are_refused(cell: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="options expects a list"):
        load(tmp_path, {"question": "Which?", "options": cell, "response": "Answer: train"})


def test_more_choices_than_letters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="27 choices; at most 26 are read"):
        load(tmp_path, {"question": "Which?", "choices": list(map(str, range(27))), "answer": 3})
    for labels in (("i", "ii"), ("1", "9" * 5000), ("0", "1"), ("\u0661", "\u0662")):
        assert with_choices("Which?", tuple("xy"), labels).endswith("(a) x\n(b) y")


@pytest.mark.parametrize("letters", ["АБВГ", "абвг", "ΑΒΓΔ"])
def test_choices_keep_letters_of_other_alphabets(letters: str, tmp_path: Path) -> None:
    """So that a reply's "Ответ: Б" is an option's letter, and no unreadable text."""
    choices = [{"label": label, "text": text} for label, text in zip(letters, (*OPTIONS, "moon"), strict=True)]
    row = {"question": "Which?", "choices": choices, "answer": letters[1]}
    question = only(tmp_path, row | {"response": f"It carries. Ответ: {letters[1]}"})
    assert [line[1] for line in question.question.splitlines()[2:]] == list(letters.casefold())
    assert (question.majority, question.positives[0].answer) == ("train", "train")


def test_an_index_as_text_is_refused_with_a_way(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,choices,answer\n2+2?,"[""3"", ""4"", ""5""]",1\n')
    with pytest.raises(InputError, match="if it counts the choices from 0: --map gold=answer"):
        load_questions(path)
    assert load_questions(path, mapping="gold=answer").questions[0].gold == "4"
    assert only(tmp_path, {"question": "2+2?", "choices": ["3", "4"], "answer_index": "1"}).gold == "4"


def test_an_index_as_text_that_is_also_a_choice(tmp_path: Path) -> None:
    row = {"question": "2+2?", "choices": ["3", "1", "4", "2"], "answer_index": "2"}
    assert only(tmp_path, row).gold == "4"  # no choice called 2
    row["answer"] = row.pop("answer_index")
    with pytest.raises(InputError, match="answer is '2', which is a choice and may count another"):
        only(tmp_path, row, mapping="gold=answer")
    assert only(tmp_path, row | {"choices": ["0", "1", "2"]}, mapping="gold=answer").gold == "2"


def test_an_instruction_beside_input_and_label_is_part_of_the_question(tmp_path: Path) -> None:
    row = {"instruction": "Is the sum even?", "input": "2+2", "label": "yes"}
    assert only(tmp_path, row).question == "Is the sum even?\n2+2"
    assert only(tmp_path, {"input": "2+2", "label": "4"}).question == "2+2"


def test_a_gold_that_counts_stays_the_choice_it_counts(tmp_path: Path) -> None:
    said = ["It is what the first one is. The answer is (a).", "It is the second. The answer is (b)."]
    row = {"question": "Which vitamin?", "choices": ["B", "D", "A", "C"], "answer": 0, "samples": said}
    question = only(tmp_path, row, split_by="gold")
    assert question.gold == "(a) B" and texts(question) == (["It is what the first one is."], ["It is the second."])
    numbered = row | {"choices": {"text": ["3", "1", "4", "2"], "label": ["1", "2", "3", "4"]}, "answer": "3"}
    question = only(tmp_path, numbered | {"samples": ["So the third. The answer is (3).", "Four. Answer: (3) 4"]})
    assert (question.task, question.gold, question.votes) == ("choice", "(3) 4", {"(3) 4": 2})


def test_a_raised_number_is_no_digit_of_the_one_before_it(tmp_path: Path) -> None:
    rows = [
        {"question": "What is 5\u00b2 + 1?", "samples": ["So 26."]},
        {"question": "What is 52 + 1?", "samples": ["So 53."]},
    ]
    assert [question.majority for question in load(tmp_path, *rows).questions] == ["26", "53"]
    same = [row | {"question": row["question"].replace("5\u00b2", "5^2").replace("52", "5^2")} for row in rows]
    assert only(tmp_path, rows[0], same[1]).votes == {"26": 1, "53": 1}


# What is no gold


@pytest.mark.parametrize("flag", [True, False, 2, 1.0, "2", "True"])
def test_whether_samples_are_correct_is_no_gold(flag: Any, tmp_path: Path) -> None:
    for sampled in (
        {"responses": [RIGHT, WRONG]},
        {"response": RIGHT},
        {"messages": [{"role": "assistant", "content": RIGHT}]},
    ):
        asked: dict[str, Any] = {"question": JARS}
        if "messages" in sampled:
            asked = {}
            sampled = {"messages": [{"role": "user", "content": JARS}, {"role": "assistant", "content": RIGHT}]}
        result = load(tmp_path, {**asked, **sampled, "correct": flag})
        assert result.questions[0].gold is None and "correct" in result.summary.keys_not_read
    assert only(tmp_path, {"question": JARS, "correct": "18"}).gold == "18"


@pytest.mark.parametrize("flag", [True, False, 1, 0, "1", "false"])
def test_a_label_of_a_reply_is_refused_with_a_way(flag: Any, tmp_path: Path) -> None:
    row = {"prompt": JARS, "completion": RIGHT, "label": flag}
    with pytest.raises(InputError, match="label may be of the reply or a gold answer"):
        load(tmp_path, row)
    assert only(tmp_path, row, mapping="completion=completion").gold is None
    assert only(tmp_path, row, mapping="gold=label").gold is not None
    assert only(tmp_path, {**row, "label": 18}).gold == "18"


@pytest.mark.parametrize("gold", ["NaN", "nan", "None", "null", "N/A", "  "])
def test_a_gold_that_says_nothing_is_missing(gold: str, tmp_path: Path) -> None:
    for row in ({"question": JARS, "samples": [RIGHT]}, {"query": JARS, "response": RIGHT}):
        question = only(tmp_path, {**row, "answer": gold})
        assert question.gold is None and question.task == "number"


@pytest.mark.parametrize("cell", ["NaN", "None", "null", "N/A", "  "])
def test_cells_that_say_nothing_are_missing(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'question,answer,rationale,prediction\n"{JARS}",{cell},{cell},18\n"{JARS}",18,3 + 6,9\n')
    (question,) = load_questions(path).questions
    assert question.gold == "18" and sorted(question.votes) == ["18", "9"]
    assert {r.text for r in question.positives + question.negatives} == {"3 + 6"}
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"question": [JARS] * 2, "answer": [cell, "18"], "response": [RIGHT, WRONG]}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    assert load_questions(tmp_path / "rows.parquet").questions[0].gold == "18"


def test_a_gold_that_is_an_option_called_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,A,B,C,answer\nWhich?,All,None,Some,None\nHow?,x,y,z,None\n")
    assert [question.gold for question in load_questions(path).questions] == ["None", None]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"question": ["Which?", "How?"], "choices": [["All", "N/A"], ["x", "y"]], "answer": ["N/A", "N/A"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    assert [question.gold for question in load_questions(tmp_path / "rows.parquet").questions] == ["N/A", None]


# Samples in columns


def test_numbered_answers_belong_to_numbered_rationales(tmp_path: Path) -> None:
    row = {"Question": JARS, "Answer": "18", "rationale_1": "First 3 + 6 = 9", "answer_1": "18",
           "rationale_2": "6 and 3 is 9", "answer_2": "9", "rationale_3": "thrice", "answer_3": None}  # fmt: skip
    result = load(tmp_path, row, split_by="gold")
    assert result.questions[0].votes == {"18": 1, "9": 1} and result.summary.unreadable == 1
    assert texts(result.questions[0]) == (["First 3 + 6 = 9"], ["6 and 3 is 9"]) and not result.summary.keys_not_read


@pytest.mark.parametrize("key", ["extracted_answers", "parsed_answers", "model_answers", "preds"])
def test_lists_of_predictions_belong_to_lists_of_samples(key: str, tmp_path: Path) -> None:
    row = {"question": JARS, "answer": "18", "generations": ["thrice 6", "3 more", "6 thrice"], key: ["18", "9", "18"]}
    assert only(tmp_path, row).votes == {"18": 2, "9": 1}


def test_a_text_that_holds_the_output_is_the_template(tmp_path: Path) -> None:
    row = {
        "instruction": JARS,
        "input": "",
        "output": RIGHT,
        "text": f"Below is ...\n### Instruction:\n{JARS}\n### Response:\n{RIGHT}",
    }
    result = load(tmp_path, row)
    assert texts(result.questions[0]) == (["Six and six and six."], []) and not result.summary.keys_not_read
    with pytest.raises(InputError, match="may each be the sample"):
        load(tmp_path, {**row, "text": WRONG})


def test_mapped_samples(tmp_path: Path) -> None:
    row = {"prompt": JARS, "answers": [{"answer": RIGHT, "model": "a"}, {"answer": WRONG, "model": "b"}]}
    assert only(tmp_path, row, mapping="samples=answers").votes == {"18": 1, "9": 1}
    nested = {"question": JARS, "resps": [[RIGHT, WRONG]]}
    assert only(tmp_path, nested, mapping="samples=resps").votes == {"18": 1, "9": 1}


# Worked solutions and templates


def test_a_worked_solution_beside_the_answer(tmp_path: Path) -> None:
    row = {"question": JARS, "solution": "In all 3 * 6 = <<3*6=18>>18 jars.\n#### 18", "answer": "18"}
    (positive,) = only(tmp_path, row).positives
    assert (positive.text, positive.answer, positive.source) == ("In all 3 * 6 = 18 jars.", "18", "gold")
    for end in ("#### 9", r"So \boxed{9}.", "So there are 9 jars."):
        contrary = {"question": f"{JARS} Well?", "solution": f"In all 3 + 6 jars.\n{end}", "answer": "18"}
        result = load(tmp_path, row, contrary)
        assert [len(question.positives) for question in result.questions] == [1, 0]
        assert "solution (where it ends in another answer than the gold)" in result.summary.keys_not_read


TEMPLATES = {
    "ChatML": "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "ChatML, thinking": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "Mistral": "<s>[INST] {} [/INST]",
    "Llama 2": "<s>[INST] <<SYS>>\nThink.\n<</SYS>>\n\n{} [/INST]",
    "Phi": "<|user|>\n{}<|end|>\n<|assistant|>\n",
    "DeepSeek": "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>{}<\uff5cAssistant\uff5c>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_with_its_chat_template_is_the_question_in_it(name: str, tmp_path: Path) -> None:
    result = load(tmp_path, {"prompt": TEMPLATES[name].format(JARS), "outputs": [{"text": RIGHT}, {"text": WRONG}]})
    assert result.questions[0].question == JARS
    assert ("prompt[system]" in result.summary.keys_not_read) == ("Think." in TEMPLATES[name])


def test_a_template_of_several_turns_is_refused(tmp_path: Path) -> None:
    for name in ("ChatML, thinking", "Mistral"):
        prompt = TEMPLATES[name].format("3 + 3?") + "6" + TEMPLATES[name].format(JARS)
        with pytest.raises(InputError, match="prompt is a chat template"):
            load(tmp_path, {"prompt": prompt, "outputs": [{"text": RIGHT}]})
