"""Chat template that renders a message as the training prompt, for servers.

The template is Jinja, as Hugging Face tokenizers hold it. It takes the last user message for the question. A server
tokenises what it gives without adding special tokens, so the template writes those that the tokenizer would have added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qcrd_fast.models.prompts import PREDICT, Prompter, quoted

UNBOUND = 1 << 30  # tokens; a server does not cut questions
PROBES = (
    "Tom has 3 bags of 4 nuts. How many nuts?",
    "  What is 2 + 3?\n",
    'Ann says: "it\'s {{ x }} or {prompt}".\n\nA is 1\\2,\n  B is `y`!',
    "Wie viele Äpfel? 多少个苹果？ 🍎",
    "7",
)

_PRELUDE = """\
{#- Sends the last user message as the prompt of training. `task` (%(names)s), or such a word and a colon before the
    question, says what is wanted; without either it is %(default)s. Texts of special
    tokens in a message are no tokens. -#}
{%%- set ns = namespace(content='', text='', task='', after=[]) -%%}
{%%- for message in messages if message['role'] in ['user', 'assistant'] -%%}
{%%- set ns.content = message['content'] or '' -%%}
{%%- if ns.content is not string -%%}
{%%- for part in ns.content -%%}
{%%- if part['text'] is not string -%%}
{{- raise_exception('this model reads text, and no other part of a message') -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- set ns.content = ns.content | map(attribute='text') | join(' ') -%%}
{%%- endif -%%}
{%%- if message['role'] == 'user' -%%}
{%%- set ns.text = ns.content | trim -%%}
{%%- set ns.after = [] -%%}
{%%- else -%%}
{%%- set ns.after = ns.after + [{'role': 'assistant', 'content': ns.content}] -%%}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if task is defined and task -%%}
{%%- if task not in [%(tasks)s] -%%}
{{- raise_exception('task is one of %(names)s') -}}
{%%- endif -%%}
{%%- set ns.task = task -%%}
%(branches)s{%%- else -%%}
{%%- set ns.task = %(default)s -%%}
{%%- endif -%%}
{%%- if not ns.text -%%}
{{- raise_exception('the last user message is the question; it is empty') -}}
{%%- endif -%%}
{%%- for special in %(specials)s -%%}
{%%- set ns.text = ns.text.replace(special, special[:1] + ' ' + special[1:]) -%%}
{%%- endfor -%%}
{%%- set ns.text = ns.task + ': ' + ns.text -%%}
"""
_BRANCH = """\
{%%- elif ns.text.startswith(%(word)s) -%%}
{%%- set ns.task = %(name)s -%%}
{%%- set ns.text = ns.text[%(length)d:] | trim -%%}
"""
_ALONE = "{%- set tools = none -%}{%- set documents = none -%}"  # of a request; training had none
_ANSWERS = "{%- for message in ns.after -%}{{- message['content'] + eos_token -}}{%- endfor -%}"


def chat_template(prompter: Prompter, prefixes: Sequence[str]) -> str | None:
    """Return the chat template of a trained decoder; None for an encoder-decoder or if no template gives its tokens.

    `prefixes` are those of the tasks that it was trained on, the first of which is taken where a message names none.
    Each is tried on `PROBES`, and the tokens compared with `source_ids`.
    """
    if prompter.is_encoder_decoder:
        return None
    names = [prefix.removesuffix(": ") for prefix in prefixes]
    prelude = _PRELUDE % {
        "names": ", ".join(names),
        "tasks": ", ".join(map(quoted, names)),
        "default": quoted(names[0]),
        "branches": "".join(
            _BRANCH % {"word": quoted(f"{name}:"), "name": quoted(name), "length": len(name) + 1} for name in names
        ),
        "specials": f"[{', '.join(map(quoted, prompter.special_texts))}]",
    }
    for body in _bodies(prompter):
        template = prelude + body
        if sends_the_prompt(prompter, template, prefixes):
            return template
    return None


def sends_the_prompt(prompter: Prompter, template: str, prefixes: Sequence[str] = (PREDICT,)) -> bool:
    """Return whether `template` gives the tokens of `source_ids` for every probe and every way to name the task."""
    long = Prompter(
        prompter.tokenizer,
        dataclasses.replace(prompter.prompts, max_source_length=UNBOUND),
        prompter.is_encoder_decoder,
    )
    try:
        for prefix in prefixes:
            for probe in (*PROBES, *(f"a {special}{special} b?" for special in prompter.special_texts[:2])):
                wanted = long.source_ids(prefix, probe)
                if tokens_sent(prompter.tokenizer, template, prefix + probe) != wanted:
                    return False
                if tokens_sent(prompter.tokenizer, template, probe, task=prefix.removesuffix(": ")) != wanted:
                    return False
        return tokens_sent(prompter.tokenizer, template, PROBES[0]) == long.source_ids(prefixes[0], PROBES[0])
    except Exception:  # whatever a template or tokenizer of anybody's can raise
        return False


def tokens_sent(tokenizer: Any, template: str, message: str, **variables: Any) -> list[int]:
    """The tokens that a server gives a model for one user message."""
    chat = [{"role": "user", "content": message}]
    sent = tokenizer.apply_chat_template(
        chat, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True, **variables
    )
    return list(sent["input_ids"])


def modelfile(prompter: Prompter, prefix: str) -> str | None:
    """Return an Ollama Modelfile with the prompt of one task; None if its template language cannot express it."""
    tokenizer, mark = prompter.tokenizer, "\0"
    text = prompter.chat_text(mark) if prompter.prompts.template == "chat" else prompter.form.replace("{prompt}", mark)
    if _tokens_in_front(prompter) and tokenizer.bos_token:  # which Ollama adds as the tokenizer does
        text = text.removeprefix(tokenizer.bos_token)
    if '"""' in text or "{{" in text or "}}" in text or mark not in text or text.endswith('"'):
        return None
    text = text.replace(mark, prefix + "{{ .Prompt }}")
    limit = prompter.prompts.max_target_length
    return f'FROM .\nTEMPLATE """{text}"""\nPARAMETER temperature 0\nPARAMETER num_predict {limit}\n'


def _bodies(prompter: Prompter) -> list[str]:
    """Yield candidates for the text after the prelude, likeliest first."""
    if prompter.prompts.template == "chat":
        own = prompter.own_template()
        system = (
            f"{{'role': 'system', 'content': {quoted(prompter.prompts.system)}}}, " if prompter.prompts.system else ""
        )
        messages = "{%- set messages = [" + system + "{'role': 'user', 'content': ns.text}] + ns.after -%}"
        return [_ALONE + messages + "{{- '' }}" + own]
    added = _tokens_in_front(prompter)
    found = []
    for front in ([*added], [*added, quoted(" ")], []):
        pieces = " + ns.text + ".join(quoted(piece) for piece in prompter.form.split("{prompt}"))
        found.append("{{- " + " + ".join([*front, pieces]) + " -}}\n" + _ANSWERS)
    return found


def _tokens_in_front(prompter: Prompter) -> list[str]:
    """The tokens that the tokenizer puts before a text, as parts of a Jinja expression."""
    tokenizer = prompter.tokenizer
    ids, plain = (tokenizer(PROBES[0], add_special_tokens=special).input_ids for special in (True, False))
    count = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
    texts = tokenizer.convert_ids_to_tokens(ids[:count])
    return ["bos_token" if text == tokenizer.bos_token else quoted(text) for text in texts]
