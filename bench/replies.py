"""User time of reading replies against their length: doubling a reply should double it.

    python -m qcrd_fast.bench.replies [--size 500000]

Prints, for each kind of hostile reply, the seconds at the size and at twice the size, and their ratio.
"""

from __future__ import annotations

import argparse
import resource

from qcrd_fast.config import TASKS
from qcrd_fast.data.choices import parse_choices
from qcrd_fast.data.replies import read_reply

KINDS = {
    "nested braces": ("\\boxed{", "{"),
    "nested fractions": ("\\boxed{", "\\frac{"),
    "digits": ("The answer is ", "9"),
    "tags": ("", "<think>"),
    "end tags": ("", "</think>"),
    "unclosed tags": ("", "<think "),
    "markers": ("", "The answer is "),
    "labels": ("", "Answer: "),
    "boxes": ("", "\\boxed{5} "),
    "headings": ("", "#### "),
    "spaces": ("The answer is", " "),
    "lines": ("", "\n"),
    "backslashes": ("", "\\"),
    "dollars": ("", "$"),
    "parentheses": ("", "("),
    "operators": ("", "1+"),
    "stars": ("", "*"),
    "options": ("", "(A) x (B) y "),
    "Chinese markers": ("", "答案是"),
    "control tokens": ("", "<|end|>"),
    "prose": ("", "There are 3 crates of 6 jars each. "),
}
FLOOR_S = 0.02  # below this a ratio says nothing


def seconds(text: str) -> float:
    """User time [s] of reading `text` for every task."""
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for task in TASKS:
        read_reply(text, task, parse_choices(text) if task == "choice" else ())
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - start


def main() -> None:
    """Measure every kind and print a table; the exit code is 1 where a ratio is above 2.5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=500_000, help="characters")
    size = parser.parse_args().size
    worst = 0.0
    print(f"{'kind':<18}{size:>12,}{2 * size:>12,}   ratio")
    for kind, (head, piece) in KINDS.items():
        once, twice = (seconds(head + piece * (length // len(piece))) for length in (size, 2 * size))
        ratio = twice / once if twice > FLOOR_S and once else 1.0
        worst = max(worst, ratio)
        print(f"{kind:<18}{once:>11.3f}s{twice:>11.3f}s   {ratio:.2f}")
    raise SystemExit(worst > 2.5)


if __name__ == "__main__":
    main()
