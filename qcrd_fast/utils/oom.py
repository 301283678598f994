"""Detect running out of memory and suggest options that help. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from qcrd_fast.config import DiscriminatorOptions, NegativeOptions, TrainConfig
from qcrd_fast.errors import RunError
from qcrd_fast.utils.memory import free_bytes

# What allocators say: torch's, C++'s, cuBLAS's
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")
Method = TypeVar("Method", bound=Callable[..., Any])


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error means out of memory, on the host or on a GPU."""
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def explaining_oom(options: str, during: str = "", longest: Callable[[], str] | None = None) -> Iterator[None]:
    """Convert out-of-memory errors to a `RunError` that suggests options and names the longest row."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        said = " ".join(str(error).split())[:200] or f"{free_bytes() / 1e9:.2f} GB are free"
        row = f"; the longest row there: {longest()}" if longest else ""
        raise RunError(f"out of memory{during and ' in ' + during} ({said}); what helps: {options}{row}") from error


def explains_oom(
    during: str, options: Callable[[TrainConfig], str], longest: Callable[..., str] | None = None
) -> Callable[[Method], Method]:
    """Decorate a method of an object with a `config` with `explaining_oom`. `longest` takes the method's arguments."""

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            with explaining_oom(options(self.config), during, longest and functools.partial(longest, self, *args)):
                return method(self, *args, **kwargs)

        return wrapped

    return decorate


# ---- what helps, the best first ----


def for_training(config: TrainConfig) -> str:
    size, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    less = size // 2 if size % 2 == 0 else 1
    smaller = (
        f"--per-device-train-batch-size {less} --gradient-accumulation-steps {parts * size // less} (the same step)"
    )
    return _joined(
        smaller if size > 1 else "",
        "" if config.gradient_checkpointing else "--gradient-checkpointing",
        "--forward two-pass" if config.forward == "joint" else "",
        f"--max-target-length below {config.max_target_length}, --max-source-length below {config.max_source_length}",
        "" if config.use_peft else "--use-peft",
    )


def for_weights(config: TrainConfig) -> str:
    several = "" if config.fsdp else "--fsdp on several GPUs"
    return _joined("" if config.use_peft else "--use-peft", several, "a smaller --student")


def for_sampling(config: NegativeOptions) -> str:
    return _joined(
        _halved("--sample-batch-size", config.sample_batch_size), f"--max-new-tokens below {config.max_new_tokens}"
    )


def for_judging(config: DiscriminatorOptions) -> str:
    size = config.discriminator_batch_size
    return _joined(_halved("--discriminator-batch-size", size), "a smaller --discriminator, or none")


def for_answers(option: str, batch_size: int, max_answer_tokens: int) -> str:
    return _joined(_halved(option, batch_size), f"--max-answer-tokens below {max_answer_tokens}")


def _halved(option: str, value: int) -> str:
    return f"{option} {value // 2}" if value > 1 else ""


def _joined(*parts: str) -> str:
    return ", or ".join(part for part in parts if part)
