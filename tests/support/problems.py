"""Two-step word problems and a teacher that slips now and then: the rows of many tests."""

from __future__ import annotations

import dataclasses
import random

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jill")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "shells", "stamps", "stones")
MORE = ("finds", "buys", "gets", "makes")
LESS = ("loses", "sells", "eats", "drops")
SAMPLES = 5
SLIP = 0.12  # chance that the teacher gets one of its two steps wrong
LARGEST = 7  # operands are 2..LARGEST


@dataclasses.dataclass(frozen=True)
class Problem:
    """`name` has a things, gets b more, then loses c: how many are left?"""

    name: str
    thing: str
    more: str
    less: str
    a: int
    b: int
    c: int

    @property
    def answer(self) -> str:
        return str(self.a + self.b - self.c)

    @property
    def question(self) -> str:
        return (
            f"{self.name} has {self.a} {self.thing}, {self.more} {self.b} and {self.less} {self.c}. How many are left?"
        )


def draw_problems(count: int, rng: random.Random) -> list[Problem]:
    """Distinct problems, in a drawn order."""
    seen: dict[Problem, None] = {}
    while len(seen) < count:
        a, b, c = (rng.randint(2, LARGEST) for _ in range(3))
        problem = Problem(rng.choice(NAMES), rng.choice(THINGS), rng.choice(MORE), rng.choice(LESS), a, b, c)
        if c <= a + b:
            seen[problem] = None
    return list(seen)


def teach(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """One sampled (rationale, answer) of the teacher, in one of several wordings, sometimes with a slip."""
    p = problem
    total = p.a + p.b
    slip = rng.choice(("total", "rest", "sign")) if rng.random() < 2 * SLIP else ""
    if slip == "total":
        total = max(p.c, total + rng.choice((-2, -1, 1, 2)))
    rest, sign = total - p.c, "-"
    if slip == "rest":
        rest = max(0, rest + rng.choice((-2, -1, 1, 2)))
    elif slip == "sign":
        rest, sign = total + p.c, "+"
    first = rng.choice(
        (
            f"First {p.a} + {p.b} = {total}.",
            f"{p.name} {p.more} {p.b}: {p.a} + {p.b} = {total}.",
            f"Now there are {p.a} + {p.b} = {total}.",
            f"Add: {p.a} + {p.b} = {total}.",
        )
    )
    second = rng.choice(
        (
            f"Then {total} {sign} {p.c} = {rest}.",
            f"{p.name} {p.less} {p.c}: {total} {sign} {p.c} = {rest}.",
            f"So {total} {sign} {p.c} = {rest} are left.",
            f"Subtract: {total} {sign} {p.c} = {rest}.",
        )
    )
    return f"{first} {second}", str(rest)
