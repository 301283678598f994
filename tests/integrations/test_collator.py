"""The collator's batch: prompts of the trainer's own, targets already shifted, indices that the loss takes as they
are."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_fast import QCRDLoss, RationaleCollator
from qcrd_fast.config import TrainConfig
from qcrd_fast.data.formats.native import native_row
from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import read_head
from qcrd_fast.models.prompts import PromptSettings, with_views
from qcrd_fast.models.student import Student
from qcrd_fast.models.views import view_table
from qcrd_fast.train.examples import make_examples

ROWS = [
    {
        "id": "a",
        "question": "Ann has 3 pens, buys 4 and loses 2. How many are left?",
        "gold": "5",
        "majority": "5",
        "votes": {"5": 2, "6": None},  # a table's column that another row filled
        "positives": [
            {"text": "Add: 3 + 4 = 7. So 7 - 2 = 5 are left.", "answer": "5", "score": 0.75},
            "First 3 + 4 = 7.",
        ],
        "negatives": [{"text": "So 9 - 3 = 6 are left.", "answer": "6", "score": 0.25}],
    },
    {
        "id": "b",
        "question": "Ben has 2 keys. How many are left?",
        "gold": None,
        "majority": "2",
        "positives": [],
        "negatives": [],
    },
]


def load(folder, auto):
    return Student(auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), PromptSettings())


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_prompts_and_targets_are_the_trainers(kind, views, t5_folder, llama_folder):
    """Reading the tensors back gives the token ids that `qcrd-fast train` makes of the same rows."""
    folder, auto = (t5_folder, AutoModelForSeq2SeqLM) if kind == "t5" else (llama_folder, AutoModelForCausalLM)
    student, rows, own = load(folder, auto), ROWS, {"verse": "In verse."}
    if views:
        first, second = ROWS[0]["positives"]
        rows = [{**ROWS[0], "view": "short", "positives": [first, {"text": second, "view": "verse"}]}, ROWS[1]]
        student.prompts = with_views(student.prompts, view_table(own, "views"))
    questions = [native_row({**row, "votes": None})[0] for row in rows]
    examples = make_examples(questions, student, TrainConfig(negative_source="minority"))
    expected = [(0, c.prompt or e.explain, c.tokens) for e in examples for c in e.candidates({})]
    expected += [(q, e.predict, e.label) for q, e in enumerate(examples)]
    batch = RationaleCollator(student.tokenizer, student.model, views=own)(rows)
    assert batch["num_questions"] == 2 and batch["labels"].ne(-100).sum() == batch["labels"][:, 1:].ne(-100).sum() == 2
    assert batch["question_key"].tolist() == [e.key for e in examples]
    assert batch["question"].tolist() == [0, 0, 0, 0, 1] and batch["is_label"].tolist() == [False] * 3 + [True] * 2
    assert batch["positive"].tolist() == [True, True, False, True, True] and "quality" not in batch
    assert batch["max_selected_tokens"] == max(len(t) for _, _, t in expected[:2]) + sum(
        len(t) for _, _, t in expected[2:]
    )
    for b, (_, prompt, target) in enumerate(expected):
        scored = batch["target"][b] != -100
        assert batch["target"][b][scored].tolist() == target
        assert (batch["rationale"][b] == b).all()
        if kind == "t5":
            source = batch["source"][b]
            assert batch["input_ids"][source][batch["attention_mask"][source] == 1].tolist() == prompt
            assert batch["decoder_input_ids"][b][: len(target)].tolist() == [0, *target[:-1]]
        else:
            ids = batch["input_ids"][b][batch["attention_mask"][b] == 1].tolist()
            assert ids == prompt + target[:-1] and scored.nonzero()[0, 0] == len(prompt) - 1
    if kind == "t5":
        # the prompt of question a is read once, or once a view, and there are two labels
        assert len(batch["input_ids"]) == (4 if views else 3)
    with pytest.raises(InputError, match="view 'rhyme' is in no table"):
        RationaleCollator(student.tokenizer, student.model)([{**ROWS[0], "view": "rhyme"}])


def test_batch_fits_the_loss_by_hand(llama_folder, float64):
    """Without labels, the tensors go into `QCRDLoss` as they are, padding and all."""
    student = load(llama_folder, AutoModelForCausalLM)
    batch = RationaleCollator(student.tokenizer, student.model, label="none", quality="score")(
        [dict(ROWS[0], positives=ROWS[0]["positives"][:1])]
    )
    hidden = student.model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    out = QCRDLoss(delta=9.0)(
        hidden, read_head(student.model).weight, batch["target"], batch["rationale"], batch["question"],
        batch["positive"],
        batch["quality"], num_questions=batch["num_questions"], max_selected_tokens=batch["max_selected_tokens"],
    )  # fmt: skip
    nll = out.nll_R.tolist()
    assert out.loss.item() == pytest.approx(0.75 * nll[0] - 0.2 * 0.75 * (nll[1] - 9.0), rel=1e-10)
    out.loss.backward()


def test_quality(t5_folder):
    """Scores of the rows, or a function's, which sees the texts; labels weigh 1."""
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    seen = []

    def judge(pairs):
        seen.extend(pairs)
        return torch.linspace(0.1, 0.3, len(pairs))

    batch = RationaleCollator(tokenizer, is_encoder_decoder=True, quality=judge)(ROWS)
    torch.testing.assert_close(batch["quality"], torch.tensor([0.1, 0.2, 0.3, 1.0, 1.0]))
    assert seen[1] == (ROWS[0]["question"], "First 3 + 4 = 7.")
    with pytest.raises(InputError, match="question 'a': a rationale has no score"):
        RationaleCollator(tokenizer, is_encoder_decoder=True, quality="score")(ROWS)


def test_settings(t5_folder):
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    collate = RationaleCollator(
        tokenizer,
        is_encoder_decoder=True,
        decoder_start_token_id=2,
        num_positives=1,
        max_target_length=4,
        label="majority",
    )
    batch = collate([ROWS[0]])
    assert len(batch["target"]) == 3 and batch["target"].shape[1] == 4 and (batch["decoder_input_ids"][:, 0] == 2).all()
    assert batch["target"][0, -1] != tokenizer.eos_token_id  # cut, so without EOS
    assert batch["target"][-1].tolist()[:2] == [
        *tokenizer("5", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]


def test_a_batch_without_rationales(t5_folder):
    """One sequence that scores nothing, so that a rank can still run its model."""
    batch = RationaleCollator(AutoTokenizer.from_pretrained(t5_folder), is_encoder_decoder=True, label="none")(ROWS[1:])
    assert batch["target"].tolist() == [[-100]] and batch["num_questions"] == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": [1]}, "no 'question' among .*remove_unused_columns=False"),
        ("text", "expected a dictionary, got str"),
        ({"id": "x", "question": " "}, "row 'x': question is empty"),
        ({"question": "q", "samples": []}, "qcrd-fast prepare"),
        ({"question": "q", "positives": "no", "negatives": []}, "positives expects a list"),
        ({"question": "q", "positives": [], "negatives": []}, "question 'q' has no gold or majority answer"),
    ],
)
def test_bad_rows(row, message, t5_folder):
    collate = RationaleCollator(AutoTokenizer.from_pretrained(t5_folder), is_encoder_decoder=True)
    with pytest.raises(InputError, match=message):
        collate([row])


@pytest.mark.parametrize(
    "options", [{}, {"label": "answer"}, {"quality": "quality"}, {"prompt_template": "chat"}, {"views": ["a"]}]
)
def test_bad_settings(options, t5_folder):
    options = {"is_encoder_decoder": True, **options} if options else options
    with pytest.raises(InputError):
        RationaleCollator(AutoTokenizer.from_pretrained(t5_folder), **options)


@pytest.mark.parametrize("name", ["num_positives", "max_source_length", "max_target_length"])
def test_counts_are_above_0(name, t5_folder):
    with pytest.raises(InputError, match=f"{name} must be a whole number above 0, got -1"):
        RationaleCollator(AutoTokenizer.from_pretrained(t5_folder), is_encoder_decoder=True, **{name: -1})


def test_what_is_no_tokenizer_no_quality_and_no_row(t5_folder):
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    with pytest.raises(InputError, match="must be a Hugging Face tokenizer, got 't5-small'"):
        RationaleCollator("t5-small", is_encoder_decoder=True)
    with pytest.raises(InputError, match=r"a function; got 0\.5"):
        RationaleCollator(tokenizer, is_encoder_decoder=True, quality=0.5)
    with pytest.raises(InputError, match="at least one is needed"):
        RationaleCollator(tokenizer, is_encoder_decoder=True)([])
    row = {"question": "q", "majority": "1", "positives": ["a", "b"], "negatives": ["c"]}
    collate = RationaleCollator(tokenizer, is_encoder_decoder=True, quality=lambda pairs: torch.ones(1))
    with pytest.raises(InputError, match=r"one score for each of 3 rationales, got \[1\]"):
        collate([row])
    collate = RationaleCollator(tokenizer, is_encoder_decoder=True, quality=lambda pairs: [0.5] * 3)
    assert collate([row])["quality"].tolist() == [0.5, 0.5, 0.5, 1.0]
