"""The token that a decoder gets before the first target token, read off the model, as some shift differently."""

from __future__ import annotations

from typing import Any, Literal

import torch

from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import unwrapped

Start = int | Literal["last"]


def decoder_start(model: Any) -> Start | None:
    """Return the token id; "last" if the target's last token comes first (mBART); None if unknown.

    A model's `prepare_decoder_input_ids_from_labels` or `_shift_right` is asked, which trains it, and then its
    configuration. Raises `InputError` where that fails, or does something else than shift right by one.
    """
    model = unwrapped(model)
    config, name = model.config, type(model).__name__
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    if shift is None:
        return getattr(config, "decoder_start_token_id", None)
    sides = (config, getattr(config, "decoder", None))
    pads = {getattr(side, "pad_token_id", None) for side in sides}
    a, b, c = [i for i in range(8) if i not in pads][:3]
    labels = torch.tensor([[a, b, c], [b, c, a]])
    try:
        shifted = shift(labels.clone())
    except Exception as error:
        raise InputError(
            f"{name}: its decoder has no start token ({error}); set model.config.decoder_start_token_id"
        ) from error
    if torch.equal(shifted[:, 1:], labels[:, :-1]):
        first = shifted[:, 0].tolist()
        if first[0] == first[1]:
            return int(first[0])
        if first == labels[:, -1].tolist():
            return "last"
    raise InputError(
        f"{name} is not supported: it makes {shifted.tolist()} the decoder's input for the labels {labels.tolist()}"
    )
