"""How sure a difference between methods is: a paired bootstrap over questions and seeds. numpy alone.

Accuracy is a mean over seeds and over questions, which are crossed: every seed answers the same questions, and a
question that is hard is hard for all seeds. So both are resampled, and a pair of methods is resampled together. Few
seeds make a bootstrap too narrow (it takes five seeds for all there are) and crossed noise makes it too wide, so its
width is set by the unbiased variance of a crossed design, with Student's t for the few degrees of freedom.

Shapes: S seeds, Q questions, B resamples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import PREDICTIONS
from qcrd_fast.utils.files import read_records
from qcrd_fast.utils.intervals import wilson

RESAMPLES = 4000
Z = 1.959964
MAX_CELLS = 4_000_000  # of the resampled counts held at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, in the units of the values."""

    mean: float
    low: float
    high: float
    error: float  # standard error
    detectable: float  # smallest true difference that such an experiment finds with 80% power at the 5% level
    seeds: int
    questions: int


def estimate(value_SQ: Any, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of `value_SQ` [S, Q] with an interval over seeds and questions.

    With one seed the interval covers other questions alone. Raises `ValueError` for anything but a filled matrix.
    """
    value_SQ = np.asarray(value_SQ, np.float64)
    if value_SQ.ndim != 2 or value_SQ.size == 0:
        raise ValueError(f"expected a value for each seed and question, got shape {value_SQ.shape}")
    S, Q = value_SQ.shape
    mean = float(value_SQ.mean())
    variance, freedom = crossed_variance(value_SQ)
    error = math.sqrt(variance)
    drawn_B = resampled_means(value_SQ, seed, resamples) - mean
    spread = float(drawn_B.std())
    half = student_t(0.975, freedom) * error
    if spread > 0 and error > 0:  # the bootstrap's shape at the width of the crossed design
        low, high = (float(q) * half / (Z * spread) for q in np.quantile(drawn_B, (0.025, 0.975)))
    else:
        low, high = -half, half
    detectable = (student_t(0.975, freedom) + student_t(0.8, freedom)) * error
    return Estimate(mean, mean + low, mean + high, error, detectable, S, Q)


def compare(a_SQ: Any, b_SQ: Any, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """`a` minus `b`, paired: the same questions in the same order, seed by seed."""
    a_SQ, b_SQ = np.asarray(a_SQ, np.float64), np.asarray(b_SQ, np.float64)
    if a_SQ.shape != b_SQ.shape:
        raise ValueError(f"a pair needs the same seeds and questions, got shapes {a_SQ.shape} and {b_SQ.shape}")
    return estimate(a_SQ - b_SQ, seed, resamples)


def resampled_means(value_SQ: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """[B] means over S seeds and Q questions, both drawn with replacement; one seed is kept as it is."""
    S, Q = value_SQ.shape
    random = np.random.default_rng(seed)
    found = []
    size = max(1, min(resamples, MAX_CELLS // Q))
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        question_BQ = random.multinomial(Q, np.full(Q, 1 / Q), size=count) / Q
        seed_BS = random.multinomial(S, np.full(S, 1 / S), size=count) / S
        found.append(((question_BQ @ value_SQ.T) * seed_BS).sum(1))
    return np.concatenate(found)


def crossed_variance(value_SQ: NDArray[np.float64]) -> tuple[float, float]:
    """Return (variance of the mean, degrees of freedom) with random seeds, questions and interaction.

    (MS_seeds + MS_questions - MS_both) / SQ is unbiased; it is not let under what either alone says. Degrees of freedom
    by Satterthwaite. With one seed, or one question, the other's alone.
    """
    S, Q = value_SQ.shape
    row_S, column_Q = value_SQ.mean(1), value_SQ.mean(0)
    if S == 1 or Q == 1:
        n = max(S, Q)
        return (float(value_SQ.var(ddof=1)) / n if n > 1 else 0.0), max(n - 1, 1)
    seeds, questions = Q * float(row_S.var(ddof=1)), S * float(column_Q.var(ddof=1))
    rest_SQ = value_SQ - row_S[:, None] - column_Q + value_SQ.mean()
    both = float((rest_SQ**2).sum()) / ((S - 1) * (Q - 1))
    total = seeds + questions - both
    if total > max(seeds, questions) > 0:
        parts = seeds**2 / (S - 1) + questions**2 / (Q - 1) + both**2 / ((S - 1) * (Q - 1))
        return total / (S * Q), max(total**2 / parts, 1.0)
    return max(seeds, questions) / (S * Q), (Q if questions >= seeds else S) - 1


def student_t(share: float, freedom: float) -> float:
    """Return a quantile of Student's t for real degrees of freedom from 1.

    With t = sqrt(n) tan(a), the density of a is cos(a)^(n-1), which is summed over a fine grid.
    """
    if freedom > 1e4:  # normal, to 1e-3 of its width
        freedom = 1e4
    edge = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    middle = (edge[1:] + edge[:-1]) / 2
    below = np.concatenate(([0.0], np.cumsum(np.cos(middle) ** (freedom - 1))))
    return float(math.sqrt(freedom) * math.tan(np.interp(share, below / below[-1], edge)))


# ---- what runs got right ----


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which questions a run got right: bits in the order of the sorted ids, and a digest of these ids."""

    bits: tuple[bool, ...]
    questions: str

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Answers:
        """From the records of predictions.jsonl (`id`, `correct`)."""
        right = {str(r["id"]): bool(r["correct"]) for r in records}
        ids = sorted(right)
        digest = hashlib.sha256("\0".join(ids).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return cls(tuple(right[i] for i in ids), digest)

    @classmethod
    def read(cls, run: str | Path) -> Answers:
        """From a run folder. Raises `InputError` when it has no predictions."""
        path = Path(run) / PREDICTIONS
        try:
            return cls.of(list(read_records(path, "raise")))
        except (OSError, InputError, KeyError) as error:
            raise InputError(f"{path}: no predictions to compare: {error}") from error

    def to_hex(self) -> str:
        return np.packbits(np.array(self.bits, bool)).tobytes().hex()

    @classmethod
    def from_hex(cls, text: str, count: int, questions: str) -> Answers:
        """Decode `to_hex` of `count` questions. Raises `ValueError` for another number."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
        if len(bits) != -(-count // 8) * 8:
            raise ValueError(f"{len(bits)} bits for {count} questions")
        return cls(tuple(bits[:count].astype(bool).tolist()), questions)


def pair(a: Mapping[int, Answers], b: Mapping[int, Answers]) -> Estimate | None:
    """Return `a` minus `b` over common seeds ({seed: answers}); None without one or with other questions."""
    seeds = sorted(set(a) & set(b))
    if not seeds or len({x[s].questions for x in (a, b) for s in seeds}) != 1:
        return None
    return compare([a[s].bits for s in seeds], [b[s].bits for s in seeds])


def single(a: Mapping[int, Answers]) -> Estimate | None:
    """The accuracy of {seed: answers}; None without a seed, or when their questions differ.

    Of one seed the interval is Wilson's, as it is of a run wherever one is shown; so it is where all seeds have every
    question right, or wrong, of which no variance can be seen. An interval ends at 0 and 1.
    """
    if not a or len({answers.questions for answers in a.values()}) != 1:
        return None
    told = estimate([a[s].bits for s in sorted(a)])
    low, high = told.low, told.high
    if len(a) == 1 or told.error == 0:
        low, high = wilson(told.mean, told.questions)
    return dataclasses.replace(told, low=max(low, 0.0), high=min(high, 1.0))
