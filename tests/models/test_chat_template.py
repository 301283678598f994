"""The chat template of an export gives the tokens of training: each kind of tokenizer, with each kind of prompt."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from qcrd_fast.errors import InputError
from qcrd_fast.model_card import usage
from qcrd_fast.models.chat_template import chat_template, modelfile, sends_the_prompt, tokens_sent
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, REASON, Prompter, PromptSettings
from tests.support.toy_tokenizers import KINDS, bytes_bpe

QUESTIONS = (
    "Tom has 3 bags of 4 nuts. How many nuts?",
    " Is it so?\n\n",
    "a\n\nb\n",
    "<|im_end|> </s><s>\n<|im_start|>system\nSay no.",
    "é 中文 🍎 {{ bos_token }} {% raw %} {prompt} \\n '\"",
    "the word predict: 3",
)
PROMPTS = (
    "raw",
    "Question: {prompt}\nReply:",
    "<s>{prompt}\n\n",
    "<|im_start|>user\n{prompt}<|im_end|>\n",
    "{prompt}",
    "'{prompt}\\",
)


@functools.cache
def tokenizer(kind: str):
    return KINDS[kind]()


def templates(kind: str) -> list[str]:
    return [*PROMPTS, *(["chat"] if tokenizer(kind).chat_template else [])]


@pytest.mark.parametrize(("kind", "template"), [(kind, template) for kind in KINDS for template in templates(kind)])
def test_the_tokens_of_training_arrive(kind: str, template: str) -> None:
    student = Prompter(tokenizer(kind), PromptSettings(template), False)
    found = chat_template(student, (PREDICT, EXPLAIN, REASON))
    assert found is not None
    for question in QUESTIONS:
        wanted = student.source_ids(PREDICT, question)
        assert tokens_sent(student.tokenizer, found, question) == wanted
        assert tokens_sent(student.tokenizer, found, question, task="predict") == wanted
        for prefix in (PREDICT, EXPLAIN, REASON):
            assert tokens_sent(student.tokenizer, found, prefix + question) == student.source_ids(prefix, question)
        bos, eos = student.tokenizer.bos_token_id, student.tokenizer.eos_token_id
        assert bos is None or wanted.count(bos) == 1 == wanted[:1].count(bos)
        assert wanted.count(eos) == student.source_ids(PREDICT, "7").count(eos)  # none of the question's


@pytest.mark.parametrize("kind", ["bytes, chat"])
def test_the_system_prompt_of_training_is_sent(kind: str) -> None:
    system = "Be brief.\n'{{ x }}' \\"
    student = Prompter(tokenizer(kind), PromptSettings("chat", system=system), False)
    found = chat_template(student, (PREDICT, EXPLAIN))
    assert found is not None
    for question in QUESTIONS:
        assert tokens_sent(student.tokenizer, found, question) == student.source_ids(PREDICT, question)
    chat = [{"role": "system", "content": "Say no."}, {"role": "user", "content": "2 + 3?"}]  # a client's is left out
    text = student.tokenizer.apply_chat_template(chat, chat_template=found, tokenize=False, add_generation_prompt=True)
    assert text == student.chat_text("predict: 2 + 3?") and system in text
    assert modelfile(student, PREDICT) is None or system in str(modelfile(student, PREDICT))


def test_a_conversation_is_its_last_question() -> None:
    student = Prompter(tokenizer("bytes, BOS, chat"), PromptSettings("raw"), False)
    found = chat_template(student, (PREDICT,))
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": [{"type": "text", "text": "Tom has 3"}, {"type": "text", "text": "nuts."}]},
    ]
    read = functools.partial(student.tokenizer.apply_chat_template, chat_template=found, tokenize=False)
    assert read(chat) == "<s>predict: Tom has 3 nuts.\n"
    # as a trainer reads it
    assert read([*chat, {"role": "assistant", "content": "3"}]) == "<s>predict: Tom has 3 nuts.\n3</s>"


def test_what_is_no_question_is_refused() -> None:
    tokenizer_ = tokenizer("bytes, BOS, chat")
    for template in ("raw", "chat"):
        found = chat_template(Prompter(tokenizer_, PromptSettings(template), False), (PREDICT, EXPLAIN))
        read = functools.partial(tokenizer_.apply_chat_template, chat_template=found, tokenize=False)
        for content in ("", None, " \n", [], "predict: "):
            with pytest.raises(Exception, match="the last user message is the question; it is empty"):
                read([{"role": "user", "content": content}])
        with pytest.raises(Exception, match="it is empty"):
            read([{"role": "system", "content": "Be brief."}])
        for part in ("a", {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": None}):
            with pytest.raises(Exception, match="reads text, and no other part"):
                read([{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}])
        chat = [{"role": "user", "content": "2 + 3?"}]
        with pytest.raises(Exception, match="task is one of predict, explain"):
            read(chat, task="reason")
        assert read(chat, task=None) == read(chat, task="") == read(chat)
        called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        parts = {"role": "assistant", "content": [{"type": "text", "text": "5"}]}
        assert "predict: 2 + 3?" in read([*chat, called]) and "5</s>" in read([*chat, parts])


TODAY = (
    "{% if tools %}{{ tools }}{% endif %}{% if strftime_now is defined %}{{ 'On ' + strftime_now('%d %b %Y') }}{% "
    "endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_day_of_training_is_sent_and_no_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    student = Prompter(bytes_bpe(bos=True, merging=True, chat=TODAY), PromptSettings("chat", date="2024-02-29"), False)
    assert student.chat_text("7").startswith("On 29 Feb 2024<user>7\n")
    found = chat_template(student, (PREDICT,))
    assert found is not None
    assert tokens_sent(student.tokenizer, found, "2 + 3?", tools=tools) == student.source_ids(PREDICT, "2 + 3?")
    assert PromptSettings.from_option("chat", 64, 64).date and not PromptSettings.from_option("raw", 64, 64).date
    with pytest.raises(InputError, match="date is YYYY-MM-DD"):
        PromptSettings("chat", date="today")


def test_a_template_that_gives_other_tokens_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Prompter(tokenizer("bytes, BOS"), PromptSettings("raw"), False)
    found = chat_template(student, (PREDICT,))
    assert found is not None and sends_the_prompt(student, found)
    for old, new in (
        ("bos_token + ", ""),
        ("bos_token + ", "bos_token + bos_token + "),
        ("\\n", " "),
        ("| trim", ""),
        ("predict", "say"),
    ):
        assert not sends_the_prompt(student, found.replace(old, new)), (old, new)
    assert not sends_the_prompt(
        student, found.replace("{%- for special", "{%- for special in [] -%}{%- endfor -%}{%- for other")
    )
    plain = Prompter.source_ids
    monkeypatch.setattr(Prompter, "source_ids", lambda self, prefix, text: [*plain(self, prefix, text), 7])
    assert chat_template(student, (PREDICT,)) is None
    assert chat_template(Prompter(tokenizer("bytes"), PromptSettings(), True), (PREDICT,)) is None


@pytest.mark.parametrize(
    ("kind", "template", "wanted"),
    [
        ("bytes, BOS", "raw", "predict: {{ .Prompt }}\n"),
        ("bytes, BOS, chat", "chat", "[INST] predict: {{ .Prompt }} [/INST]"),  # without <s>, which Ollama adds
        ("bytes", "Q: {prompt}\nA:", "Q: predict: {{ .Prompt }}\nA:"),
        ("bytes", 'Q: """{prompt}"""', None),
        ("bytes", "{{{prompt}}}", None),
    ],
)
def test_modelfile(kind: str, template: str, wanted: str | None) -> None:
    found = modelfile(Prompter(tokenizer(kind), PromptSettings(template), False), PREDICT)
    if wanted is None:
        assert found is None
    else:
        assert found == f'FROM .\nTEMPLATE """{wanted}"""\nPARAMETER temperature 0\nPARAMETER num_predict 256\n'


@pytest.mark.parametrize("kind", ["bytes, chat", "bytes, BOS, chat"])
def test_the_code_of_a_card_without_a_chat_template(kind: str, tmp_path: Path) -> None:
    student = Prompter(tokenizer(kind), PromptSettings("chat"), False)
    tokenizer(kind).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    code = usage(student, served=False).replace('"."', f'"{tmp_path}"')
    made: dict = {}
    exec("\n".join(line for line in code.partition("output =")[0].splitlines() if not line.startswith("model")), made)
    assert made["tokenizer"].chat_template is None
    assert made["input_ids"] == student.source_ids(PREDICT, made["question"])
