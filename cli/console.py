"""Run a verb: logs to stderr, results to stdout, signals, and errors as exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TextIO

import click

from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.utils.files import FULL
from qcrd_fast.utils.oom import is_exhausted
from qcrd_fast.utils.redact import RedactingFormatter, harmless, redact

from .options import suggest


class _Terminated(BaseException):
    """SIGTERM came; not an `Exception`, so that nothing on the way takes it for an error."""


def run(call: Callable[[], Any]) -> int:
    """Return the exit code of `call`; print errors to stderr, on one line if the user can act on them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a result may hold what the terminal's encoding lacks
    try:
        with _logs_to_stderr(), _signals_exit():
            result = call()
            sys.stdout.flush()
            return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _say(_usage_message(error))
        return error.exit_code
    except (InputError, RunError, Stopped) as error:
        _say(f"qcrd-fast: {error}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("qcrd-fast: interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our results has gone; nothing may be flushed to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _Terminated:
        _say("qcrd-fast: terminated")
        return 128 + signal.SIGTERM
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            _say(f"qcrd-fast: {os.fsdecode(error.filename or '')[:80]!r}: {error.strerror}")
            return InputError.exit_code
        if isinstance(error, OSError) and error.errno in FULL:
            place = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            _say(f"qcrd-fast: {error.strerror}{place}; free some, then run the same command again")
            return RunError.exit_code
        if is_exhausted(error):
            _say("qcrd-fast: out of memory; less at a time helps: fewer rows, shorter texts, smaller batches")
        else:
            _say(traceback.format_exc().rstrip())
        return 1


def show(result: Any, as_json: bool, text: str) -> None:
    """Print a verb's result: as JSON, or as a few lines."""
    click.echo(json.dumps(result, ensure_ascii=False, indent=2) if as_json else text)


def lines(results: Mapping[str, Any]) -> str:
    """The scalars of a result, one a line, NAME with its interval NAME_95 where there is one."""
    rows = {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in results.items()
        if isinstance(value, int | float | str)
    }
    for name in rows:
        if span := results.get(f"{name}_95"):
            rows[name] += f" (95% interval {span[0]:.4f} to {span[1]:.4f}, over questions)"
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def plan_lines(plan: Mapping[str, Any]) -> str:
    """Format the result of `train --dry-run`, memory in MiB or GiB."""
    row, memory = plan.get("longest_row"), plan.get("memory") or {}
    rest = {"longest_row": "{id}, {prompt_tokens} prompt + {target_tokens} target tokens".format(**row)} if row else {}
    return lines({**plan, **rest, **{f"memory {name}": _size(name, value) for name, value in memory.items()}})


def _size(name: str, value: Any) -> str:
    if not isinstance(value, int) or name.startswith("micro_batch"):
        return "unknown" if value is None else str(value)
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect library output to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _usage_message(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    message = error.format_message()
    if isinstance(error, click.NoSuchOption):
        flags = [flag for p in ctx.command.params for flag in (*p.opts, *p.secondary_opts)] if ctx else []
        message = f"unknown option {error.option_name}{suggest(error.option_name, flags)}"
    path = ctx.command_path if ctx else "qcrd-fast"
    return f"{path}: {message} (see {path} --help)"


def _say(text: str) -> None:
    print(harmless(redact(text)), file=sys.stderr, flush=True)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Log lines on stderr, above a progress bar on a terminal, which also replaces progress lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.stream.isatty():
            super().emit(record)
        elif not getattr(record, "progress", False):
            tqdm = sys.modules.get("tqdm")  # loaded by now if there is a bar
            with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else contextlib.nullcontext():
                super().emit(record)


@contextlib.contextmanager
def _logs_to_stderr() -> Iterator[None]:
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("qcrd_fast")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Unwind on SIGINT and SIGTERM, then exit with 130 and 143.

    During an import, which would turn the exception into another error, exit at once. `train` and `collect` handle
    signals themselves while there is a step to finish.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        at = frame
        while at is not None:
            if at.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, b"qcrd-fast: interrupted\n" if signum == signal.SIGINT else b"qcrd-fast: terminated\n")
                os._exit(128 + signum)
            at = at.f_back
        raise KeyboardInterrupt if signum == signal.SIGINT else _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
