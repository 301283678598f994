r"""Normalise LaTeX answers (task `math`); optionally compare them by math-verify in a separate process."""

from __future__ import annotations

import atexit
import importlib.util
import json
import re
import select
import subprocess
import sys
from functools import lru_cache

from qcrd_fast.data.quantities import plain

MAX_FORM = 1024  # characters
TIMEOUT_S = 5.0

_MATH = re.compile(r"\\[A-Za-z]+|[\^_]|^[\[(][^\[\]()]*,[^\[\]()]*[\])]$|^\{.*\}$|\\\{|√|π|∞|[=<>≤≥]")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("{", "}"))
_WHOLE_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|boxed)\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?:\\[,;: ]|~|\s)*\\(?:text|mathrm|mbox)\{\s*[A-Za-z "
    r".^/%°]+\}(?:\^\{?[23]\}?)?$|(?:\^\{?\\circ\}?|\\degree|°|\\%|%)$"
)
_PLAIN = re.compile(r"[-+]?\s*[\d.,/()\s*^]+%?|[-+]?\d[\d.,]*\s*[A-Za-z. ]{0,40}")
_VARIABLE = re.compile(r"^[A-Za-z](?:_\{?\w\}?)?\s*=\s*")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?:[ ,]+[A-Za-z]{2,}){2,}")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\w)\s*(\w))")
_SETS = {r"\{": "{", r"\}": "}"}

_WORKER = """
import json, sys
sys.path = [path for path in sys.path if path]
from math_verify import parse, verify
for line in sys.stdin:
    a, b = json.loads(line)
    try:
        same = bool(verify(parse("$" + a + "$", parsing_timeout=None), parse("$" + b + "$", parsing_timeout=None),
        timeout_seconds=None))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        same = False
    print(json.dumps(same), flush=True)
"""


def looks_like_math(text: str) -> bool:
    """Whether an answer is written in LaTeX, or is an interval, a set or a term with signs of its own."""
    return len(text) <= MAX_FORM and _MATH.search(text) is not None and not _PROSE.search(text) and "\n" not in text


def looks_like_prose(text: str) -> bool:
    """Whether a text is words, and no formula."""
    return _PROSE.search(text) is not None or (
        _MATH.search(text) is None and not re.search(r"\d", text) and " " in text.strip()
    )


def unwrapped(text: str) -> str:
    r"""Strip delimiters around the whole text: `$..$`, `\(..\)`, `\text{..}`, `**..**`, and a final stop."""
    text = text[:MAX_FORM].strip()
    for _ in range(6):
        before = text
        text = text.rstrip(" .。,;") if not text.endswith("...") else text
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and _balanced(inner, left)
            ):
                text = inner.strip()
        if match := _WHOLE_TEXT.fullmatch(text):
            text = match[1].strip()
        if text == before:
            break
    return text


def _balanced(text: str, left: str) -> bool:
    if left != "{":
        return left not in text
    depth = 0
    for c in text:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return False
    return depth == 0


def is_plain_number(text: str) -> bool:
    """Whether an answer is a number with perhaps a unit, and no tuple, interval, set or equation."""
    text = plain(_UNIT.sub("", _VARIABLE.sub("", text))).strip()
    if re.match(r"[(\[].*,.*[)\]]$", text) or re.search(r",\s", text):
        return False
    return _PLAIN.fullmatch(text) is not None


def normal_form(text: str) -> str | None:
    r"""Normalise LaTeX: `\dfrac` to `\frac`; no sizes, white space, units or `x =`; None for prose."""
    if _PROSE.search(text):
        return None
    text = _BINOMIAL.sub(lambda match: f"binom({match[1] or match[3]},{match[2] or match[4]})", text)
    if "\\begin" in text:
        text = text.replace("\\\\", ";")  # a matrix's rows
    for command, sign in _SETS.items():
        text = text.replace(command, "\x01" if sign == "{" else "\x02")
    text = _UNIT.sub("", _VARIABLE.sub("", text))
    text = re.sub(r"\s+", "", plain(text)).replace("\x01", "{").replace("\x02", "}").rstrip(".,;")
    text = re.sub(r"(?<=[\dA-Za-z)])\*(?=[A-Za-zπ√(])", "", text)
    text = re.sub(r"√\((\w)\)", r"√\1", text)
    text = re.sub(r"\^\((-?\w+)\)", r"^\1", text)
    text = re.sub(
        r"(?<![\w)])\((\d+|[A-Za-zπ])\)(?=/)|(?<=/)\((\d+|[A-Za-zπ])\)", lambda match: match[1] or match[2], text
    )
    return text or None


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the extra `math` (math-verify) is installed."""
    return importlib.util.find_spec("math_verify") is not None


class _Verifier:
    """One process that compares; ended where a comparison takes longer than `TIMEOUT_S`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, a: str, b: str) -> bool:
        if self.process is None:
            command = [sys.executable, "-c", _WORKER]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            atexit.register(self.close)
            first = 6 * TIMEOUT_S  # it loads sympy
        else:
            first = TIMEOUT_S
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([a, b]) + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], first)[0]:
                return self.process.stdout.readline().strip() == "true"
        except OSError:
            pass
        self.close()
        return False

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream:
                    stream.close()
            self.process = None


_VERIFIER = _Verifier()


@lru_cache(maxsize=8192)
def _compare(a: str, b: str) -> bool:
    return _VERIFIER.ask(a, b)


def verified(a: str, b: str) -> bool:
    """Return whether math-verify, if installed, finds two LaTeX answers equal, in either order."""
    if not available() or max(len(a), len(b)) > MAX_FORM:
        return False
    return _compare(*sorted((a, b)))
