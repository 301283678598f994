"""Measure how well scores tell right from wrong: AUC with interval, calibration. numpy only.

Shapes: R rationales, Q questions, B resamples of the questions, G groups of equal scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES, BINS = 1000, 10
MAX_CELLS = 4_000_000  # of weight_BR held at once


def auc(score_R: Any, positive_R: Any, weight_BR: Any = None) -> Any:
    """Return the probability that a positive scores above a negative, ties counting half.

    A float, or [B] with `weight_BR`; nan without a pair.
    """
    score_R, positive_R = np.asarray(score_R, float), np.asarray(positive_R, bool)
    single = weight_BR is None
    weight_BR = np.ones((1, len(score_R))) if single else np.asarray(weight_BR, float)
    if len(score_R) == 0:
        return float("nan") if single else np.full(len(weight_BR), np.nan)
    order = np.argsort(score_R, kind="stable")
    score_R, positive_R, weight_BR = score_R[order], positive_R[order], weight_BR[:, order]
    start_G = np.flatnonzero(np.r_[True, score_R[1:] != score_R[:-1]])
    positive_BG = np.add.reduceat(weight_BR * positive_R, start_G, axis=1)
    negative_BG = np.add.reduceat(weight_BR * ~positive_R, start_G, axis=1)
    below_BG = np.cumsum(negative_BG, axis=1) - negative_BG / 2
    pairs_B = positive_BG.sum(1) * negative_BG.sum(1)
    with np.errstate(invalid="ignore"):
        value_B = np.where(pairs_B > 0, (positive_BG * below_BG).sum(1) / pairs_B, np.nan)
    return float(value_B[0]) if single else value_B


def question_weights(question_R: Sequence[Any], seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Return weight_BR: how often each rationale's question occurs in each of B bootstrap samples of questions."""
    if not len(question_R):
        return np.ones((resamples, 0))
    _, index_R = np.unique(np.asarray(question_R, dtype=str), return_inverse=True)
    count = int(index_R.max()) + 1
    drawn_BQ = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn_BQ[:, index_R].astype(np.float64)


def auc_resampled(
    score_R: Any, positive_R: Any, question_R: Sequence[Any], seed: int = 0, resamples: int = RESAMPLES
) -> Floats:
    """AUC in each of B bootstrap samples of the questions, a bounded number of them at once."""
    size = max(1, min(resamples, MAX_CELLS // max(1, len(question_R))))
    return np.concatenate(
        [
            auc(score_R, positive_R, question_weights(question_R, seed + start, min(size, resamples - start)))
            for start in range(0, resamples, size)
        ]
    )


def interval(value_B: Any) -> list[float] | None:
    """The middle 95 % of bootstrap values, those that could be computed; None without any."""
    finite = np.asarray(value_B)[np.isfinite(value_B)]
    return [float(v) for v in np.quantile(finite, (0.025, 0.975))] if len(finite) else None


def auc_by_fold(score_R: Any, positive_R: Any, fold_R: Any, weight_BR: Any) -> Floats:
    """Return AUC [B] over pairs within a fold, scored by one model; nan without a pair."""
    score_R, positive_R, fold_R = np.asarray(score_R, float), np.asarray(positive_R, bool), np.asarray(fold_R)
    weight_BR = np.asarray(weight_BR, float)
    above_B = pairs_B = np.zeros(len(weight_BR))
    for fold in np.unique(fold_R):
        own = fold_R == fold
        count_B = weight_BR[:, own & positive_R].sum(1) * weight_BR[:, own & ~positive_R].sum(1)
        above_B = above_B + count_B * np.nan_to_num(auc(score_R[own], positive_R[own], weight_BR[:, own]))
        pairs_B = pairs_B + count_B
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs_B > 0, above_B / pairs_B, np.nan)


def auc_within(score_R: Any, positive_R: Any, question_R: Sequence[Any]) -> float | None:
    """Return AUC over pairs within a question, averaged over questions with both classes; None without any."""
    score_R, positive_R = np.asarray(score_R, float), np.asarray(positive_R, bool)
    names = np.asarray(question_R, dtype=str)
    values = [auc(score_R[names == name], positive_R[names == name]) for name in np.unique(names)]
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else None


def calibration(score_R: Any, positive_R: Any, bins: int = BINS) -> dict[str, Any]:
    """Return the expected calibration error and its table: mean score and share of positives by score bin."""
    score_R, positive_R = np.asarray(score_R, float), np.asarray(positive_R, bool)
    bin_R = np.clip((score_R * bins).astype(int), 0, bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        inside = bin_R == b
        if n := int(inside.sum()):
            mean, share = float(score_R[inside].mean()), float(positive_R[inside].mean())
            table.append({"low": b / bins, "high": (b + 1) / bins, "n": n, "score": mean, "share_positive": share})
            error += n / len(score_R) * abs(mean - share)
    return {"expected_calibration_error": error if table else None, "reliability": table}


def platt(logit_R: Any, positive_R: Any, steps: int = 100) -> tuple[float, float]:
    """(a, b) of the calibrated score sigmoid(a logit + b): Platt scaling, by Newton's method.

    The targets are smoothed as in Platt (1999): (n+ + 1) / (n+ + 2) and 1 / (n- + 2), so that classes that are told
    apart without error keep a finite slope. a >= 0: where a higher logit means worse, the score is the base rate.
    Without both classes (1, 0): the scores stay as they are.
    """
    logit_R, positive_R = np.asarray(logit_R, float), np.asarray(positive_R, bool)
    rights, wrongs = int(positive_R.sum()), int((~positive_R).sum())
    if not rights or not wrongs:
        return 1.0, 0.0
    target_R = np.where(positive_R, (rights + 1) / (rights + 2), 1 / (wrongs + 2))
    rate = float(target_R.mean())
    base = float(np.log(rate / (1 - rate)))
    middle, spread = float(logit_R.mean()), float(logit_R.std())
    if spread < 1e-12 * max(1.0, abs(middle)):
        return 0.0, base
    design_R2 = np.stack([(logit_R - middle) / spread, np.ones_like(logit_R)], axis=1)

    def loss(theta_2: Floats) -> float:
        z_R = design_R2 @ theta_2
        return float(np.mean(np.logaddexp(0, z_R) - target_R * z_R))

    theta_2 = np.array([0.0, base])
    for _ in range(steps):
        score_R = 1 / (1 + np.exp(-np.clip(design_R2 @ theta_2, -500, 500)))
        gradient_2 = design_R2.T @ (score_R - target_R) / len(target_R)
        hessian_22 = (design_R2.T * (score_R * (1 - score_R))) @ design_R2 / len(target_R) + 1e-12 * np.eye(2)
        step_2 = np.linalg.solve(hessian_22, gradient_2)
        size = 1.0
        while size > 1e-6 and loss(theta_2 - size * step_2) > loss(theta_2):
            size /= 2
        theta_2 = theta_2 - size * step_2
        if np.abs(size * step_2).max() < 1e-10:
            break
    if theta_2[0] <= 0:
        return 0.0, base
    slope = float(theta_2[0] / spread)
    return slope, float(theta_2[1]) - slope * middle


def score_report(score_R: Any, positive_R: Any, question_R: Sequence[Any], seed: int = 0) -> dict[str, Any]:
    """Return AUC with 95% interval (bootstrap over questions), AUC within questions and calibration, for JSON."""
    value = auc(score_R, positive_R)
    return {
        "auc": None if np.isnan(value) else value,
        "auc_95": interval(auc_resampled(score_R, positive_R, question_R, seed)),
        "auc_within_questions": auc_within(score_R, positive_R, question_R),
        "positives": int(np.sum(positive_R)),
        "negatives": int(len(positive_R) - np.sum(positive_R)),
        "questions": len(set(question_R)),
        **calibration(score_R, positive_R),
    }
