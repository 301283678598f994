"""Small tokenizers of the kinds that models have: with a BOS and without, that keep a newline apart and that do not."""

from __future__ import annotations

from typing import Any

TEXTS = [
    "predict: explain: reason: Answer: Question: Reply: user assistant system",
    *(
        f"Tom has {i} bags of {i + 2} nuts. How many nuts?\n{i} * {i + 2} = {i * (i + 2)}.\n\nIs it so?\n"
        for i in range(40)
    ),
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe "
    "brief.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MERGING = (
    # `?` and a newline: one token
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bytes_bpe(*, bos: bool, merging: bool, chat: str | None = None) -> Any:
    """BPE over bytes, as GPT-2 has; `bos`: it begins a text with <s>; `merging`: as Llama 3 and Qwen split words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(MERGING), "isolated")] if merging else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=not merging)])
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, trainers.BpeTrainer, bos, chat, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def pieces(*, bos: bool, prepend: str, chat: str | None = None) -> Any:
    """Pieces with a mark for a blank, as SentencePiece has; `prepend`: where a text gets one of its own, always or
    first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return _finished(tokenizer, trainers.BpeTrainer, bos, chat)


def _finished(tokenizer: Any, trainer: Any, bos: bool, chat: str | None, **settings: Any) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        TEXTS, trainer(vocab_size=600, special_tokens=special, show_progress=False, **settings)
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="<|im_end|>" if chat == CHATML else "</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=chat,
    )


KINDS = {
    "bytes": lambda: bytes_bpe(bos=False, merging=False),
    "bytes, chat": lambda: bytes_bpe(bos=False, merging=True, chat=CHATML),
    "bytes, BOS": lambda: bytes_bpe(bos=True, merging=True),
    "bytes, BOS, chat": lambda: bytes_bpe(bos=True, merging=True, chat=INST),
    "pieces, always": lambda: pieces(bos=True, prepend="always", chat=INST),
    "pieces, first": lambda: pieces(bos=True, prepend="first", chat=INST),
    "pieces, never": lambda: pieces(bos=False, prepend="never"),
}
