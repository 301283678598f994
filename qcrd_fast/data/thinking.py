"""Separate a reply's reasoning blocks from the rest: tags, channels and control tokens of chat models."""

from __future__ import annotations

import re
from typing import NamedTuple

THINKING = ("auto", "drop", "keep", "only")  # --thinking

_NAMES = (
    "think|thinking|thought|thoughts|reasoning|reason|reflection|scratchpad|analysis|seed:think|longcot|cot|chain_of_thought|"
    "inner_monologue|explanation|rationale"
)
_OPEN = rf"<(?:{_NAMES})(?:\s[^<>\n]{{0,80}})?>|\[think\]|◁think▷|<\|begin_of_thought\|>|<\|(?:start_)?think(?:ing)?\|>"
_CLOSE = rf"</(?:{_NAMES})\s*>|\[/think\]|◁/think▷|<\|end_of_thought\|>|<\|(?:/|end_)think(?:ing)?\|>"
_CHANNEL = r"<\|?channel\|?>\s{0,9}(?:analysis|commentary|thought|thinking)\b[^<\n]{0,80}(?:<\|message\|>)?"
_FINAL = r"<\|?channel\|?>\s{0,9}final\b[^<\n]{0,80}(?:<\|message\|>)?|<channel\|>"
_TAG = re.compile(
    rf"(?P<open>{_OPEN}|{_CHANNEL})|(?P<close>{_CLOSE}|{_FINAL})|(?P<turn><\|start\|>\s{{0,9}}assistant)", re.IGNORECASE
)
_BARE = re.compile(r"\Aanalysis(?=[A-Z\"'(])")  # a channel whose control tokens were stripped by the decoder
_BARE_FINAL = "assistantfinal"
_END = re.compile(
    r"<\|(?:end|return|call|im_end|eot_id|endoftext|end_of_text|end_of_turn|eot|END_RESPONSE|END_OF_TURN_TOKEN)\|>|</s>|"
    r"<end_of_turn>|<eos>"
)
_TURN = r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:assistant|user|human)\|>|\[INST\]"
_HEADER = re.compile(rf"\s*(?:{_TURN})?\s*(?:(?:assistant|model)\b\s*)?(?:<\|end_header_id\|>)?", re.IGNORECASE)
_STOP = re.compile(rf"{_END.pattern}|{_TURN}", re.IGNORECASE)
_BEFORE = re.compile(rf"(?:\s|{_END.pattern})+")
_TOKENS = re.compile(
    r"<(?:s|pad|bos|unk)>|<\|(?:begin_of_text|startoftext|start_of_text|bos|pad|START_RESPONSE|START_OF_TURN_TOKEN|"
    r"CHATBOT_TOKEN)\|>"
)
_ESCAPED = re.compile(rf"&lt;(/?(?:{_NAMES}|answer|final_answer)\s*)&gt;", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]*([\w:]*)[ \t]*$", re.MULTILINE)
_ANSWER_TAG = re.compile(r"<(/?)(?:final[_ -]?)?answer\s*>", re.IGNORECASE)
_LINE_TAG = re.compile(
    r"<(?:/?(?:p|div|h[1-6]|li|ul|ol|tr|table|tbody|blockquote)|br\s*/?)(?:\s[^<>\n]{0,120})?>", re.IGNORECASE
)
_WORD_TAG = re.compile(
    r"</?(?:b|strong|i|em|u|span|mark|font|small|code|td|th|center)(?:\s[^<>\n]{0,120})?>", re.IGNORECASE
)
_FENCE_NAMES = frozenset(_NAMES.split("|"))
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")


class Parts(NamedTuple):
    """`thinking` and `outside` of a reply; `cut`: a block was never closed, so no answer was reached."""

    thinking: str
    outside: str
    cut: bool


def split_thinking(text: str) -> Parts:
    """A reply's reasoning blocks and the rest.

    An end without a start closes whatever stands before it; a start without an end runs to the end of the text. Of a
    chat transcript, the first turn counts: control tokens go, and so does what follows the next turn's start.
    """
    if not any(sign in text for sign in ("<", "[", "\u25c1", "analysis", "&lt;", "```")):
        return Parts("", text.strip(), False)
    text = _fenced(_ESCAPED.sub(r"<\1>", _TOKENS.sub("", text)))
    thinking: list[str] = []
    outside: list[str] = []
    inside, position = False, 0
    if match := _BARE.match(text):
        head, final, rest = text[match.end() :].partition(_BARE_FINAL)
        return Parts(_clean(head), _first_turn(rest) if final else "", not final)
    for tag in _TAG.finditer(text):
        piece, position = text[position : tag.start()], tag.end()
        if inside:
            thinking.append(piece)
            inside = tag.lastgroup == "open" or (tag.lastgroup == "turn" and not _END.search(piece))
        elif tag.lastgroup == "open":
            outside.append(piece)
            inside = True
        elif tag.lastgroup == "close" and not _is_final(tag[0]):
            thinking += [*outside, piece]
            outside = []
        else:
            outside.append(piece)
    (thinking if inside else outside).append(text[position:])
    return Parts(_clean("\n".join(thinking)), _first_turn("".join(outside)), inside)


def _is_final(tag: str) -> bool:
    return "channel" in tag.lower()


def _first_turn(text: str) -> str:
    """`text` up to the control token that ends the turn."""
    if before := _BEFORE.match(text):
        text = text[before.end() :]
    header = _HEADER.match(text)
    if header and "<" in header[0]:
        text = text[header.end() :]
    for stop in _STOP.finditer(text):
        if text[: stop.start()].strip():
            text = text[: stop.start()]
            break
    return _clean(_unmarked(text))


def _fenced(text: str) -> str:
    """`text` with code fences of reasoning (```think) as tags."""
    if "```" not in text:
        return text
    out: list[str] = []
    position, inside = 0, ""
    for fence in _FENCE.finditer(text):
        name = fence[1].lower()
        if not inside and name in _FENCE_NAMES:
            out += [text[position : fence.start()], "<think>"]
            position, inside = fence.end(), "think"
        elif inside == "think" and not name:
            out += [text[position : fence.start()], "</think>"]
            position, inside = fence.end(), ""
        elif inside != "think":
            inside = "" if inside else "code"
    return "".join([*out, text[position:]])


def _unmarked(text: str) -> str:
    """`text` without HTML's tags, and the tags of an answer in one spelling."""
    if "<" not in text:
        return text
    return _WORD_TAG.sub("", _LINE_TAG.sub("\n", _ANSWER_TAG.sub(r"<\1answer>", text)))


def _clean(text: str) -> str:
    return _SOLUTION.sub("", _END.sub("", text)).strip()


def drop_tags(text: str) -> str:
    """Remove tags from reasoning, which could otherwise close its own block too early."""
    return _TAG.sub("", text) if "<" in text or "[" in text or "\u25c1" in text else text
