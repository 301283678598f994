"""Sample from a student; random numbers are keyed by (seed, question, index, iteration, position).

The noise of a token never depends on the batch it was drawn in, on the order of the questions or on earlier draws
(`ops.philox`). A token is drawn by the Gumbel-max rule, argmax of logits / temperature + Gumbel noise, which is a draw
from the softmax of logits / temperature. Students that the engine cannot run go through Hugging Face's `generate`.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from qcrd_fast.generation.decoder import find_style
from qcrd_fast.generation.engine import Sampler, SampleSettings
from qcrd_fast.generation.hf_generate import GenerateSampler
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.dispatch import require_impl
from qcrd_fast.utils.device import Autocast

log = logging.getLogger(__name__)
_styles: weakref.WeakKeyDictionary[Any, dict[bool, str | None]] = weakref.WeakKeyDictionary()  # None: generate


def sample(
    student: Student,
    sources: Sequence[TokenIds],
    keys: Sequence[tuple[int, int]],
    settings: SampleSettings,
    *,
    indices: Sequence[int] | None = None,
    iteration: int = 0,
    autocast: Autocast | None = None,
    prefixes: Sequence[TokenIds] | None = None,
) -> list[TokenIds]:
    """One continuation for each source, EOS included where it was reached within `max_new_tokens`.

    Args:
        sources: prompts as tokens. Samples of the same prompt share the reading of it.
        keys: the two words of `key_words` for each source.
        indices: which sample of its question each one is (0 unless told).
        autocast: makes the autocast context to run under; None: none.
        prefixes: the beginning of the reply that each continuation goes on from; neither returned nor counted in
            `max_new_tokens`. A decoder-only student reads it with the prompt, an encoder-decoder's decoder token by
            token.
    """
    if not sources:
        return []
    if prefixes is None or not student.is_encoder_decoder:
        if prefixes is not None:
            sources = [[*source, *prefix] for source, prefix in zip(sources, prefixes, strict=True)]
        sampler = make_sampler(student, settings, max(map(len, sources)), len(sources), autocast)
        return sampler.generate(sources, keys, indices, iteration)
    limits = [len(prefix) + settings.max_new_tokens for prefix in prefixes]
    longer = dataclasses.replace(settings, max_new_tokens=max(limits))
    sampler = make_sampler(student, longer, max(map(len, sources)), len(sources), autocast, forced=True)
    drawn = sampler.generate(sources, keys, indices, iteration, limits=limits, prefixes=prefixes)
    return [tokens[len(prefix) :] for tokens, prefix in zip(drawn, prefixes, strict=True)]


def make_sampler(
    student: Student,
    settings: SampleSettings,
    longest: int,
    most: int | None = None,
    autocast: Autocast | None = None,
    static: bool | None = None,
    forced: bool = False,
) -> Sampler | GenerateSampler:
    """A sampler for prompts of at most `longest` tokens, at most `most` of them at once; `forced`: its draws take
    prefixes. Raises `InputError` where `settings.impl` cannot run."""
    require_impl(settings.impl, student.device)
    style = _style(student, longest + settings.max_new_tokens)
    if style is None:
        return GenerateSampler(student, settings, autocast)
    return Sampler(student, settings, longest, most=most, style=style, autocast=autocast, static=static, forced=forced)


def _style(student: Student, longest: int) -> str | None:
    """`find_style`, once for each model, and once more for sequences that leave its window."""
    model, styles = student.model, _styles.setdefault(student.model, {})
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None) or 0
    beyond = 0 < window < longest
    if beyond not in styles:
        try:
            with eval_mode(model):
                styles[beyond] = find_style(student, longest)
        except ValueError as error:
            log.warning("%s samples through generate, which is slower: %s", type(model).__name__, error)
            styles[beyond] = None
    return styles[beyond]
