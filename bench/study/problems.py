"""Synthetic reasoning tasks: word problems with their computation, a noisy teacher, and neutral text of the same
vocabulary.

A computation is a list of steps (left, operation, right); every number is one token. The teacher's faults are those
that votes, equations and agreement between chains can each see in part: slips of arithmetic, wrong operations, chains
that reach the right answer by luck or by force. Within a question half of the faults are the same one, as they are with
a real teacher.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "shells")
MORE, LESS = ("finds", "buys", "gets", "makes"), ("loses", "sells", "eats", "drops")
LARGEST = 40  # of any result
SAMPLES = 5

Step = tuple[int, str, int]
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
WORD = re.compile(r"\w+:|\w+|[^\w\s]")  # a token of the students'


def result(step: Step) -> int:
    return OPERATIONS[step[1]](step[0], step[2])


@dataclasses.dataclass(frozen=True)
class Problem:
    text: str
    steps: tuple[Step, ...]
    kind: int = 0  # of its task

    @property
    def answer(self) -> int:
        return result(self.steps[-1])

    @property
    def numbers(self) -> set[int]:
        """Those that the question states."""
        return {int(word) for word in self.text.replace(".", " ").replace(",", " ").split() if word.isdigit()}


def _valid(steps: Sequence[Step]) -> bool:
    return all(0 < result(step) <= LARGEST for step in steps)


Drawn = tuple[int, str, list[Step]]  # kind, text, computation


def _mix(rng: random.Random, kinds: Sequence[int]) -> Drawn:
    n, m = rng.sample(NAMES, 2)
    thing, more, less = rng.choice(THINGS), rng.choice(MORE), rng.choice(LESS)
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    kind = rng.choice(kinds)
    left = "How many are left?"
    texts: dict[int, tuple[str, list[Step]]] = {
        0: (f"{n} has {a} {thing}, {more} {b} and {less} {c}. {left}", [(a, "+", b), (a + b, "-", c)]),
        1: (f"{n} packs {a} boxes of {b} {thing} and {less} {c}. {left}", [(a, "*", b), (a * b, "-", c)]),
        2: (f"{n} has {a} {thing}. {m} has {b} more than {n}. How many do both have?", [(a, "+", b), (a, "+", a + b)]),
        3: (f"{n} has {a} {thing}. {m} has {b} fewer than {n}. How many do both have?", [(a, "-", b), (a, "+", a - b)]),
        4: (
            f"{n} has {a} {thing}, {less} {b}, {more} {c} and {less} {d}. {left}",
            [(a, "-", b), (a - b, "+", c), (a - b + c, "-", d)],
        ),
        5: (
            f"{n} {more} {a} {thing} a day for {b} days and then {c} more. How many in all?",
            [(a, "*", b), (a * b, "+", c)],
        ),
        6: (
            f"{n} has {a} {thing}. {m} has {b} times as many. How many more does {m} have?",
            [(a, "*", b), (a * b, "-", a)],
        ),
        7: (
            f"{n} has {a} red and {b} blue {thing} and gives {c} to each of {d} others. {left}",
            [(a, "+", b), (c, "*", d), (a + b, "-", c * d)],
        ),
    }
    return kind, *texts[kind]


def _shop(rng: random.Random, kinds: Sequence[int]) -> Drawn:
    n = rng.choice(NAMES)
    x, y = rng.sample(THINGS, 2)
    a, b = (rng.randint(2, 5) for _ in range(2))
    p, q, c = (rng.randint(2, 7) for _ in range(3))
    d = rng.randint(15, 40)
    pays = f"How much does {n} pay?"
    texts: dict[int, tuple[str, list[Step]]] = {
        0: (f"{n} buys {a} {x} at {p} each and pays with {d}. How much is left?", [(a, "*", p), (d, "-", a * p)]),
        1: (f"{n} buys {a} {x} at {p} each and has {c} off. {pays}", [(a, "*", p), (a * p, "-", c)]),
        2: (f"{x} cost {p}. {y} cost {q} more than {x}. How much do both cost?", [(p, "+", q), (p, "+", p + q)]),
        3: (
            f"{n} buys {a} {x} at {p} each and {b} {y} at {q} each. {pays}",
            [(a, "*", p), (b, "*", q), (a * p, "+", b * q)],
        ),
        4: (f"{n} buys {a} boxes, each with {x} at {p} and {y} at {q}. {pays}", [(p, "+", q), (a, "*", p + q)]),
    }
    kind = rng.choice(kinds)
    return kind, *texts[kind]


_DRAW: dict[str, Callable[[random.Random], Drawn]] = {
    "mix": lambda rng: _mix(rng, range(5)),
    "shop": lambda rng: _shop(rng, range(5)),
    "times": lambda rng: _mix(rng, range(5, 8)),
}
TASKS = tuple(_DRAW)


def draw_problems(task: str, count: int, rng: random.Random, taken: set[str] | None = None) -> list[Problem]:
    """Distinct problems, none of them in `taken`, to which they are added; a quarter states a number that is not
    needed."""
    problems: list[Problem] = []
    seen = set() if taken is None else taken
    while len(problems) < count:
        kind, text, steps = _DRAW[task](rng)
        if rng.random() < 0.25:
            text = f"{rng.choice(NAMES)} is {rng.randint(5, 12)} years old. {text}"
        if _valid(steps) and text not in seen:
            seen.add(text)
            problems.append(Problem(text, tuple(steps), kind))
    return problems


# ---- the teacher ----


def write_chain(steps: Sequence[tuple[Step, int]], rng: random.Random) -> str:
    """Equations with the results as stated, in one of four wordings."""
    style, sentences = rng.randrange(4), []
    for i, ((left, operation, right), stated) in enumerate(steps):
        equation = f"{left} {operation} {right} = {stated}"
        last = i == len(steps) - 1
        lead = {"+": "Add", "-": "Subtract", "*": "Multiply"}[operation]
        sentence = (
            f"{'First' if i == 0 else 'So' if last else 'Then'} {equation}.",
            f"{lead}: {equation}.",
            f"{equation}.",
            f"{'There are' if i == 0 else 'That makes'} {equation}.",
        )[style]
        sentences.append(sentence)
    return " ".join(sentences)


Stated = list[tuple[Step, int]]


def _sound(problem: Problem) -> Stated:
    return [(step, result(step)) for step in problem.steps]


def _rerun(problem: Problem, change: Callable[[int, Step], tuple[Step, int]]) -> Stated | None:
    """The computation with each step as `change` has it, later steps taking the results of earlier ones; None out of
    range."""
    carried: dict[int, int] = {}
    stated: Stated = []
    for i, (left, operation, right) in enumerate(problem.steps):
        step, value = change(i, (carried.get(left, left), operation, carried.get(right, right)))
        if not 0 < value <= LARGEST:
            return None
        carried[result(problem.steps[i])] = value
        stated.append((step, value))
    return stated


def _slip(problem: Problem, rng: random.Random) -> Stated | None:
    at, by = rng.randrange(len(problem.steps)), rng.choice((-2, -1, 1, 2))
    return _rerun(problem, lambda i, step: (step, result(step) + (by if i == at else 0)))


def _wrong_operation(problem: Problem, rng: random.Random) -> Stated | None:
    at = rng.randrange(len(problem.steps))

    def change(i: int, step: Step) -> tuple[Step, int]:
        if i == at:
            step = (step[0], rng.choice([o for o in OPERATIONS if o != step[1]]), step[2])
        return step, result(step)

    return _rerun(problem, change)


def _wrong_number(problem: Problem, rng: random.Random) -> Stated | None:
    at, other = rng.randrange(len(problem.steps)), rng.choice(sorted(problem.numbers))

    def change(i: int, step: Step) -> tuple[Step, int]:
        if i == at:
            step = (step[0], step[1], other)
        return step, result(step)

    return _rerun(problem, change)


def _forced(problem: Problem, rng: random.Random) -> Stated | None:
    """A wrong step, and the right answer written behind the last equation all the same."""
    stated = rng.choice((_slip, _wrong_operation, _wrong_number))(problem, rng)
    if stated is None or stated[:-1] == _sound(problem)[:-1]:
        return None
    return [*stated[:-1], (stated[-1][0], problem.answer)]


def _made_up(problem: Problem, rng: random.Random) -> Stated | None:
    """True equations on numbers from nowhere that end in the right answer."""
    known, answer = problem.numbers, problem.answer
    steps = list(problem.steps[:-2]) if rng.random() < 0.5 else []
    operation = rng.choice("+-")
    left = rng.randint(2, 30)
    right = answer - left if operation == "+" else left - answer
    if right < 1 or left in known:
        return None
    return [*((s, result(s)) for s in steps), ((left, operation, right), answer)]


def _lucky(problem: Problem, rng: random.Random) -> Stated | None:
    """Another computation over the question's numbers that happens to give the answer: true equations, wrong
    reasoning."""
    numbers = sorted(problem.numbers)
    for _ in range(60):
        steps: list[Step] = [(rng.choice(numbers), rng.choice("+-*"), rng.choice(numbers))]
        for _ in range(rng.randint(0, 2)):
            steps.append((result(steps[-1]), rng.choice("+-*"), rng.choice(numbers)))
        found = next((k for k, s in enumerate(steps) if result(s) == problem.answer), None)
        if found is not None and _valid(steps[: found + 1]) and tuple(steps[: found + 1]) != problem.steps:
            return [(s, result(s)) for s in steps[: found + 1]]
    return None


def _habit(problem: Problem) -> Stated | None:
    """A kind's own shortcut to the right answer: another operation first, or a slip, and the answer forced; else an
    equation of numbers from nowhere."""
    other = {"+": "-", "-": "+", "*": "+"}
    if problem.kind % 3 == 1:
        return _made_up(problem, random.Random(problem.text))

    def change(i: int, step: Step) -> tuple[Step, int]:
        if i == 0 and problem.kind % 3 == 0:
            step = (step[0], other[step[1]], step[2])
        return step, result(step) + (i == 0 and problem.kind % 3 == 2)

    stated = _rerun(problem, change)
    return [*stated[:-1], (stated[-1][0], problem.answer)] if stated else None


WRONG, LUCKY = (_slip, _wrong_operation, _wrong_number), (_forced, _forced, _made_up, _lucky)
FAULTS = (0.45, 0.85, 0.6, 0.8, 0.5)  # share of samples with a fault, by kind
HABIT, WRONG_SHARE = 0.6, 0.5  # of the faults; of the others


def teach(problem: Problem, rng: random.Random) -> list[tuple[str, str]]:
    """`SAMPLES` sampled (rationale, answer) pairs. Kinds differ in how hard they are, and faults are mostly a kind's
    habit."""
    samples = []
    for _ in range(SAMPLES):
        stated: Stated | None = None
        if rng.random() < FAULTS[problem.kind % len(FAULTS)]:
            if rng.random() < HABIT:
                stated = _habit(problem)
            kinds = WRONG if rng.random() < WRONG_SHARE else LUCKY
            for _ in range(4):
                stated = stated or rng.choice(kinds)(problem, rng)
        stated = stated or _sound(problem)
        samples.append((write_chain(stated, rng), str(stated[-1][1])))
    return samples


def write_rows(task: str, problems: Sequence[Problem], rng: random.Random | None) -> list[dict[str, Any]]:
    """Rows of sampled questions as `prepare` and `train` read them; without `rng`, of questions that nobody
    answered."""
    rows = []
    for i, problem in enumerate(problems):
        samples = [{"rationale": r, "answer": a} for r, a in teach(problem, rng)] if rng else []
        rows.append(
            {
                "id": f"{task}-{i}",
                "question": problem.text,
                "answer": str(problem.answer),
                "task": "number",
                "samples": samples,
            }
        )
    return rows


# ---- neutral text ----


def symbol_pairs(count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """(prefix, prompt, target): computations in symbols, with words thrown in that mean nothing. They teach arithmetic
    and the shape of a chain."""
    words = [
        *NAMES,
        *THINGS,
        *MORE,
        *LESS,
        "has",
        "and",
        "each",
        "more",
        "than",
        "left",
        "How",
        "many",
        "much",
        "boxes",
        "days",
    ]
    pairs: list[tuple[str, str, str]] = []
    while len(pairs) < count:
        steps: list[Step] = [(rng.randint(2, 9 if rng.random() < 0.6 else 40), rng.choice("+-*"), rng.randint(2, 9))]
        for _ in range(rng.randint(0, 2)):
            left, other = result(steps[-1]), rng.randint(2, 12)
            operation = rng.choice("+-*") if left < 14 else rng.choice("+-")
            steps.append(
                (left, operation, other) if rng.random() < 0.7 or operation == "-" else (other, operation, left)
            )
        if _valid(steps):
            noise = [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in steps]
            prompt = ". ".join(f"{w} {a} {o} {b}" for w, (a, o, b) in zip(noise, steps, strict=True)) + "."
            pairs.append(_neutral(prompt, steps, rng))
    return pairs


def lookup_pairs(count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """As `symbol_pairs`: words with numbers in any order, then a computation over the words. They teach to find a
    number by what stands beside it, and nothing of what the words of a task ask for."""
    verbs = ["has", "and", "at", "each", *MORE, *LESS, "packs", "cost"]
    pairs: list[tuple[str, str, str]] = []
    while len(pairs) < count:
        keys = rng.sample((*NAMES, *THINGS), rng.randint(2, 4))
        value = {key: rng.randint(2, 9 if rng.random() < 0.8 else 40) for key in keys}
        facts = [f"{k} {rng.choice(verbs)} {value[k]}" if rng.random() < 0.5 else f"{value[k]} {k}" for k in keys]
        first, *rest = (rng.choice(keys) for _ in range(rng.choice((2, 2, 3, 3, 4))))
        asked, steps, left = first, [], value[first]
        for key in rest:
            operation = rng.choice("+-*")
            asked += f" {operation} {key}"
            steps.append((left, operation, value[key]))
            left = result(steps[-1])
        if _valid(steps):
            told = " ".join(fact + rng.choice((",", ".", " and", "")) for fact in facts)
            pairs.append(_neutral(f"{told} How many {asked}?", steps, rng))
    return pairs


def _neutral(prompt: str, steps: Sequence[Step], rng: random.Random) -> tuple[str, str, str]:
    if rng.random() < 0.4:
        return "predict: ", prompt, str(result(steps[-1]))
    return "explain: ", prompt, write_chain([(s, result(s)) for s in steps], rng)


def vocabulary() -> list[str]:
    """Every word, number and mark of both tasks and of the neutral text, sorted."""
    rng = random.Random(0)
    texts = [f"{prompt} {target}" for _, prompt, target in symbol_pairs(400, rng)]
    for task in TASKS:
        for problem in draw_problems(task, 600, rng):
            texts += [problem.text, *(rationale for rationale, _ in teach(problem, rng))]
    words = {word for text in texts for word in WORD.findall(text)}
    return sorted(words | set(map(str, range(LARGEST + 1))))


# ---- what a chain is worth ----


def stated_steps(text: str) -> list[tuple[int, str, int, int]]:
    """(left, operation, right, stated result) of every equation in a chain, in order."""
    return [(int(a), o, int(b), int(c)) for a, o, b, c in re.findall(r"(-?\d+) ?([-+*]) ?(-?\d+) ?= ?(-?\d+)", text)]


def is_sound(text: str, question: str, gold: str) -> bool:
    """It holds an equation, every equation holds, every number comes from the question or an earlier result, and it
    ends in the gold answer."""
    steps = stated_steps(text)
    known = {int(word) for word in question.replace(".", " ").replace(",", " ").split() if word.isdigit()}
    for left, operation, right, stated in steps:
        if OPERATIONS[operation](left, right) != stated or not {left, right} <= known:
            return False
        known.add(stated)
    numbers = [word.strip(".,:") for word in text.split() if word.strip(".,:").isdigit()]
    return bool(steps) and numbers[-1] == gold


def is_faithful(text: str, problem: Problem) -> bool:
    """Its equations are those of the problem's own computation, in any order of sums and factors."""

    def key(left: int, operation: str, right: int) -> tuple[str, tuple[int, ...]]:
        return operation, (left, right) if operation == "-" else tuple(sorted((left, right)))

    steps = stated_steps(text)
    if any(OPERATIONS[o](a, b) != c for a, o, b, c in steps):
        return False
    return sorted(key(a, o, b) for a, o, b, _ in steps) == sorted(key(*step) for step in problem.steps)
