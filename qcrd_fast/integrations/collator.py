"""Collate prepared rows into padded tensors, for an attached model or for `QCRDLoss`.

Shapes: Q questions, B sequences (R rationales, then the labels), S sources, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.data.formats.native import native_row
from qcrd_fast.data.schema import Question, Rationale, RowError, question_key, question_text
from qcrd_fast.errors import InputError
from qcrd_fast.models.decoder_start import Start, decoder_start
from qcrd_fast.models.lm_head import unwrapped
from qcrd_fast.models.padding import pad_right
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, Prompter, PromptSettings, TokenIds, with_views
from qcrd_fast.models.views import view_table

IGNORE = -100  # a target that is not scored
LABELS = ("auto", "gold", "majority", "none")
Pairs = list[tuple[str, str]]


class RationaleCollator:
    """Collate prepared rows (dicts or `Question`s): each question's rationales, then the labels.

        collate = RationaleCollator(tokenizer, model)
        batch = collate(rows)

    The prompts are those of `qcrd-fast train`: `explain: ` before a rationale's question, `predict: ` before a label's.
    A target ends in EOS, which counts; one cut at `max_target_length` gets none. The batch is a dictionary:

    | key | shape | what |
    |---|---|---|
    | `input_ids`, `attention_mask` | [B, L] or [S, L] | prompt and target; encoder-decoder: each prompt once |
    | `source` | [B] | encoder-decoder: the prompt of each sequence |
    | `decoder_input_ids` | [B, L] | encoder-decoder: the targets, shifted right |
    | `target` | [B, L] | the token that each position predicts (already shifted), -100 where none is scored |
    | `rationale` | [B, L] | the sequence that a token belongs to: 0, 0, ..., 1, 1, ... |
    | `question` | [B] | the question of each sequence, 0 to Q - 1 |
    | `positive`, `is_label` | [B] bool | positives and labels; labels |
    | `quality` | [B] fp32 | only where `quality` is given; 1 for labels |
    | `question_key` | [Q] int64 | 63 bits of the question's id, which sampling is keyed by |
    | `labels` | [Q, 2] | (-100, key): one entry a question, so that Hugging Face's `num_items_in_batch` counts
    questions |
    | `num_questions` | int | Q |
    | `max_selected_tokens` | int | a bound on the tokens that get gradient where one rationale of each kind is selected
    |

    tokenizer: a Hugging Face tokenizer with EOS. model: its model, read for the next two and not kept.
    is_encoder_decoder, decoder_start_token_id: in place of a model (default of the second: the pad token, as in T5). A
    model's own shift is asked what comes before a target (T5Gemma: BOS; mBART: the target's last token), unless it is
    given here.
    label: what the label task teaches: `auto` (gold where known, else majority), `gold`, `majority`, or `none` for no
    labels.
    quality: None for weights of 1; `"score"` for the rows' own scores; or a function of [(question, rationale), ...] to
    scores [R] in [0, 1], such as `discriminator.score`. num_positives: at most so many positives of a question.
    prompt_template, max_source_length, max_target_length [tokens], system_prompt: as in `qcrd-fast train`. views:
    {view: text} of what a prompt says to ask for a rationale of a view, beside the built-in ones, as in `--views`.

    Raises `InputError` for a row that is not a prepared one, that lacks the label or score asked for, or whose view is
    in no table.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any = None,
        *,
        is_encoder_decoder: bool | None = None,
        decoder_start_token_id: int | None = None,
        label: str = "auto",
        quality: str | Callable[[Pairs], Tensor] | None = None,
        num_positives: int | None = None,
        prompt_template: str = "raw",
        max_source_length: int = 1024,
        max_target_length: int = 256,
        system_prompt: str | None = None,
        views: Mapping[str, str] | None = None,
    ):
        config = None if model is None else unwrapped(model).config
        if is_encoder_decoder is None:
            if config is None:
                raise InputError(
                    "RationaleCollator needs the model, or is_encoder_decoder=True (T5) or False (decoder-only)"
                )
            is_encoder_decoder = bool(config.is_encoder_decoder)
        if label not in LABELS:
            raise InputError(f"label is one of {', '.join(LABELS)}; got {label!r}")
        if isinstance(quality, str) and quality != "score":
            raise InputError(f"quality is None, 'score' or a function; got {quality!r}")
        if quality is not None and not isinstance(quality, str) and not callable(quality):
            raise InputError(f"quality is None, 'score' or a function; got {quality!r}")
        for name, value in (
            ("num_positives", num_positives),
            ("max_source_length", max_source_length),
            ("max_target_length", max_target_length),
        ):
            if value is not None and not (isinstance(value, int) and value > 0):
                raise InputError(f"{name} must be a whole number above 0, got {value!r}")
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            raise InputError(f"tokenizer must be a Hugging Face tokenizer, got {tokenizer!r}")
        settings = PromptSettings.from_option(prompt_template, max_source_length, max_target_length, system_prompt)
        self.prompter = Prompter(
            tokenizer, with_views(settings, view_table(views, "views") if views else {}), is_encoder_decoder
        )
        start: Start | None = decoder_start_token_id
        if start is None and model is not None and is_encoder_decoder:
            start = decoder_start(model)
        self.start: Start = self.prompter.pad_id if start is None else start  # "last": each target's last token
        self.label, self.quality, self.num_positives = label, quality, num_positives

    def __call__(self, rows: Sequence[Mapping[str, Any] | Question]) -> dict[str, Any]:
        """The batch of these rows; its keys are listed above."""
        questions = [_question(row) for row in rows]
        if not questions:
            raise InputError("rows: at least one is needed, got none")
        sequences, rationales = self._rationales(questions)
        R = len(sequences)
        for q, item in enumerate(questions if self.label != "none" else ()):
            label = self._label(item)
            sequences.append(
                (q, self.prompter.source_ids(PREDICT, question_text(item)), self.prompter.target_ids(label), True)
            )
        if not sequences:  # a rank of its own must still run its model: a sequence without a scored token
            sequences.append((0, self.prompter.source_ids(EXPLAIN, question_text(questions[0])), [], True))
        B, key_Q = len(sequences), torch.tensor([question_key(item.id or item.question) for item in questions])
        batch: dict[str, Any] = self._pad([s[1] for s in sequences], [s[2] for s in sequences])
        batch["rationale"] = torch.arange(B)[:, None].expand(batch["target"].shape).contiguous()
        batch["question"] = torch.tensor([s[0] for s in sequences])
        batch["positive"] = torch.tensor([s[3] for s in sequences])
        batch["is_label"] = torch.arange(B) >= R
        if self.quality is not None:
            batch["quality"] = torch.ones(B)
            batch["quality"][:R] = self._scores(
                questions, [(s[0], r) for s, r in zip(sequences, rationales, strict=False)]
            )
        batch["question_key"] = key_Q
        batch["labels"] = torch.stack([torch.full_like(key_Q, IGNORE), key_Q], 1)
        batch["num_questions"] = len(questions)
        longest: dict[tuple[int, bool], int] = {}
        for q, _, target, positive in sequences[:R]:
            longest[q, positive] = max(longest.get((q, positive), 0), len(target))
        batch["max_selected_tokens"] = sum(longest.values()) + sum(len(s[2]) for s in sequences[R:])
        return batch

    def _rationales(
        self, questions: Sequence[Question]
    ) -> tuple[list[tuple[int, TokenIds, TokenIds, bool]], list[Rationale]]:
        """(question, prompt, target, positive) of every rationale, and the rationales."""
        sequences, rationales = [], []
        for q, item in enumerate(questions):
            text, prompts = question_text(item), dict[str | None, TokenIds]()
            for positive, found in ((True, item.positives[: self.num_positives]), (False, item.negatives)):
                for rationale in found:
                    view = rationale.view or item.view
                    if view not in prompts:
                        prompts[view] = self.prompter.source_ids(EXPLAIN, text, view)
                    prompt = prompts[view]
                    sequences.append((q, prompt, self.prompter.target_ids(rationale.text), positive))
                    rationales.append(rationale)
        return sequences, rationales

    def _label(self, question: Question) -> str:
        label = {"gold": question.gold, "majority": question.majority}.get(self.label)
        if self.label == "auto":
            label = question.gold if question.gold is not None else question.majority
        if label is None:
            wanted = "gold or majority" if self.label == "auto" else self.label
            raise InputError(f"question {question.id or question.question!r} has no {wanted} answer to teach")
        return label

    def _scores(self, questions: Sequence[Question], rationales: Sequence[tuple[int, Rationale]]) -> Tensor:
        if callable(self.quality):
            pairs = [(question_text(questions[q]), r.text) for q, r in rationales]
            score_R = torch.as_tensor(self.quality(pairs)).detach().float().cpu() if pairs else torch.zeros(0)
            if score_R.shape != (len(pairs),):
                raise InputError(
                    f"quality must return one score for each of {len(pairs)} rationales, got {list(score_R.shape)}"
                )
            return score_R
        for q, r in rationales:
            if r.score is None:
                raise InputError(f"question {questions[q].id or questions[q].question!r}: a rationale has no score")
        return torch.tensor([r.score for _, r in rationales])

    def _pad(self, prompts: list[TokenIds], targets: list[TokenIds]) -> dict[str, Tensor]:
        pad = self.prompter.pad_id
        if not self.prompter.is_encoder_decoder:
            inputs = [p + t[:-1] for p, t in zip(prompts, targets, strict=True)]
            # The prompt's last token predicts the target's first.
            shifted = [[IGNORE] * (len(p) - 1) + (t or [IGNORE]) for p, t in zip(prompts, targets, strict=True)]
            input_ids, mask = pad_right(inputs, pad)
            return {"input_ids": input_ids, "attention_mask": mask, "target": pad_right(shifted, IGNORE)[0]}
        distinct: dict[tuple[int, ...], int] = {}
        source = torch.tensor([distinct.setdefault(tuple(p), len(distinct)) for p in prompts])
        input_ids, mask = pad_right([list(p) for p in distinct], pad)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "source": source,
            "decoder_input_ids": pad_right([[self._start(t), *t[:-1]] for t in targets], pad)[0],
            "target": pad_right([t or [IGNORE] for t in targets], IGNORE)[0],
        }

    def _start(self, target: TokenIds) -> int:
        return self.start if isinstance(self.start, int) else (target or [self.prompter.pad_id])[-1]


def _question(row: Mapping[str, Any] | Question) -> Question:
    if isinstance(row, Question):
        return row
    try:
        if not isinstance(row, Mapping):
            raise RowError(f"expected a dictionary, got {type(row).__name__}")
        if "question" not in row:
            raise RowError(
                f"no 'question' among {sorted(map(str, row))}; Hugging Face trainers need remove_unused_columns=False"
            )
        plain = {"majority": None, **{name: value for name, value in row.items() if name != "votes"}}
        if "samples" in plain and plain["samples"] is None:  # a table has every column in every row
            del plain["samples"]
        question, _, kind = native_row(plain)
    except RowError as error:
        where = f" {row['id']!r}" if isinstance(row, Mapping) and "id" in row else ""
        raise InputError(f"row{where}: {error}") from None
    if kind == "sampled":
        raise InputError("row: these are samples, not yet voted on; make rows of them with qcrd-fast prepare")
    return question
