"""The table of formats: the keys that identify each, and its reader.

To add a format, write `read(row) -> Parsed` in a file of this folder and a line in `FORMATS`, before every entry that
would claim its rows too. Where only a name differs, add the name to `fields.ROLES` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qcrd_fast.data.formats import batch, chat, columns, dss, mentor_kd, native, preference
from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.formats.golds import is_api_choices


class Context(NamedTuple):
    """What a reader may need beside the row: file, folder, batch input."""

    name: str = ""  # of the file, without its suffix
    dss: dss.DssFiles | None = None
    batch: Mapping[str, str] | None = None  # {custom_id: question} of --batch-input


@dataclass(frozen=True)
class Format:
    """A form of rows. `auto` takes the first format of the table that claims the first row of a file."""

    name: str
    title: str
    claims: Callable[[Row], bool]
    read: Callable[[Row, Context], Parsed]


def _asks(row: Row) -> bool:
    return row.has("question") or row.has("messages")


def _list_of_samples(row: Row) -> bool:
    key = row.key("samples") or row.key("completion") or row.key("rationale")
    return key is not None and not isinstance(row.values[key], str) and not columns.is_message(row, key)


def _is_gsm8k(row: Row) -> bool:
    answer = row.values.get("answer")
    sampled = row.has("samples") or row.has("completion") or row.has("rationale") or "positives" in row.values
    return not sampled and row.has("question") and isinstance(answer, str) and "####" in answer


def _is_vllm(row: Row) -> bool:
    choices, samples = row.key("choices"), row.values.get("outputs")
    if choices and is_api_choices(row.values[choices]):
        return _asks(row)
    return (
        row.has("question")
        and isinstance(samples, list)
        and bool(samples)
        and all(isinstance(s, dict) for s in samples)
    )


def _columns(row: Row, _: Context) -> Parsed:
    return columns.read(row)


FORMATS = (
    Format(
        "openai-batch", "OpenAI batch output, joined to its input", batch.is_output, lambda r, c: batch.read(r, c.batch)
    ),
    Format("openai-batch-input", "OpenAI batch input: questions", batch.is_input, lambda r, c: batch.read_input(r)),
    Format("dss", "Distilling Step-by-Step", dss.is_dss, lambda r, c: dss.read(r, c.dss)),
    Format("preference", "preference pairs", lambda r: r.has("chosen", "rejected"), lambda r, c: preference.read(r)),
    Format("gsm8k", "GSM8K: questions with a worked solution as the gold answer", _is_gsm8k, _columns),
    Format("native", "rows of this project", native.is_native, lambda r, c: native.read(r)),
    Format("vllm", "a question and the outputs of a server", _is_vllm, _columns),
    Format(
        "open-r1",
        "a problem and its generations",
        lambda r: r.is_called("question", "problem") and _list_of_samples(r),
        _columns,
    ),
    Format(
        "distilabel",
        "an instruction and its generations",
        lambda r: (
            r.is_called("question", "instruction") and (_list_of_samples(r) or r.is_called("completion", "generation"))
        ),
        _columns,
    ),
    Format("samples", "a question and a list of samples", lambda r: _asks(r) and _list_of_samples(r), _columns),
    Format(
        "sharegpt",
        "ShareGPT conversations",
        lambda r: r.has("messages") and "conversation" in (r.key("messages") or ""),
        lambda r, c: chat.read(r),
    ),
    Format("messages", "chat messages", lambda r: r.has("messages"), lambda r, c: chat.read(r)),
    Format("mentor-kd", "Mentor-KD", mentor_kd.is_mentor_kd, lambda r, c: mentor_kd.read(r, c.name)),
    Format(
        "alpaca",
        "Alpaca: instruction, input and output, one sample a row",
        lambda r: r.is_called("question", "instruction") and r.has("completion"),
        _columns,
    ),
    Format(
        "prompt-completion",
        "a prompt and its completion, one sample a row",
        lambda r: r.is_called("question", "prompt") and r.has("completion"),
        _columns,
    ),
    Format(
        "sample-rows",
        "one sample a row",
        lambda r: (
            r.has("question") and (any(map(r.has, ("completion", "rationale", "prediction"))) or bool(r.numbered()))
        ),
        _columns,
    ),
    Format("worked", "questions with worked solutions", lambda r: r.has("question", "solution"), _columns),
    Format(
        "multiple-choice",
        "questions with choices",
        lambda r: r.has("question", "choices") or (r.has("question") and "A" in r.values),
        _columns,
    ),
    Format("questions", "questions", lambda r: r.has("question"), _columns),
)
NAMES = ("auto", *sorted(format.name for format in FORMATS))


def find_format(name: str, row: Row) -> Format | None:
    """The format called `name`; with `auto`, the first that claims the row."""
    return next((f for f in FORMATS if (f.claims(row) if name == "auto" else f.name == name)), None)
