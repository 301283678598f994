"""The arms: their differences from the common settings, as options of `train` or as `Rules`.

`Rules` are for what `train` does not offer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qcrd_fast.config import PARTS

from .objective import Rules

COMMON: dict[str, Any] = dict(
    task="number",
    per_device_train_batch_size=8,
    warmup_ratio=0.05,
    max_source_length=96,
    max_target_length=48,
    max_new_tokens=36,
    negative_top_k=5,  # of fewer than two hundred tokens; 50 would be no truncation
    negative_lag=2,
    sample_batch_size=512,
    validation_fraction=0.0,
    save_steps=100_000,
    logging_steps=1,
    discriminator_pretrain_steps=60,
    discriminator_update_batches=8,
    discriminator_learning_rate=5e-4,
)


MENTOR = "mentor"  # stands for the folder of `mentors.mentor_folder`


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm: options of `train` beside `COMMON`, or `rules` for the experimental objective.

    The teacher `MENTOR` stands for the task's own. equal_tokens: as many epochs as give it the tokens that sft-all
    trains on, if its samples are as long as those of the student that it begins with; it ends earlier where these
    tokens are trained on. warm: the share of these tokens that sft-all trains on first, as a run of its own; `options`
    are of the run that follows, whose student is the first run's. rate: times the common learning rate, of that run.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rules: Rules | None = None
    equal_tokens: bool = False
    warm: float = 0.0
    rate: float = 1.0

    @property
    def product(self) -> bool:
        """Whether `train` has these rules itself: sft-all divides a question's weight by quality."""
        rules = self.rules or Rules()
        plain = Rules("wmean", positive_judge=rules.positive_judge)
        return self.rules is None or (self.options["method"] == "sft-all" and rules == plain)


def _positives(select: str, judge: str, **options: Any) -> Arm:
    return Arm({"method": "sft-all", **options}, Rules(positives=select, positive_judge=judge))


def _negatives(source: str, beta: float = 0.2, delta: float = 3.0, positives: str = "mean", **rules: Any) -> Arm:
    """Rules with positives and pushed negatives; the minority alone needs no sampling."""
    options: dict[str, Any] = {"method": "qcrd", "discriminator": "none", "beta": beta, "delta": delta}
    options["negative_source"] = "minority" if source == "minority" else "lagged"
    return Arm(options, Rules(positives, negatives=source, **rules))


def _lagged(**options: Any) -> Arm:
    """Pushed samples of a cached student that `options` choose."""
    arm = _negatives("lagged")
    return dataclasses.replace(arm, options=arm.options | options)


JUDGED = (
    *("none", "vote", "text", "checks", "equations", "traced", "consensus", "consensus2", "consensus4"),
    *("vote*consensus2", "equations*consensus2", "traced*consensus2", "traced*consensus4", "oracle", "faithful"),
)
NEGATIVE_JUDGES = ("vote", "text", "oracle")
SOFT = {"method": "qcrd", "positive_select": "softmin", "quality": "none", "negative_source": "none"}
CHECKED = {"positive_quality": "checks", "negative_quality": "vote", "agreeing_negatives": "drop"}
# with the rate: an advantage from one sample a token is so noisy that 1.5e-3 drives the student away from its teacher
ON_POLICY: dict[str, tuple[dict[str, Any], float]] = {
    "opd mentor": ({"method": "opd", "teacher": MENTOR, "sample_batch_size": 64}, 0.2),
    "sdft": ({"method": "sdft", "sample_batch_size": 64}, 0.2),
    "gkd mentor": ({"method": "gkd", "teacher": MENTOR, "sample_batch_size": 64}, 1.0),
}
ARMS: dict[str, Arm] = {
    # methods of `train`
    **{method: Arm({"method": method}) for method in ("finetune", "dss", "sft-all", "redi")},
    "qcrd-paper": Arm({"method": "qcrd", "paper": True}),
    # the paper's selection and negatives beside the discriminator that is the default today
    "qcrd-discriminator": Arm({"method": "qcrd", **PARTS}),
    "qcrd-none": Arm({"method": "qcrd", **PARTS, "quality": "none"}),
    "qcrd-vote": Arm({"method": "qcrd", **PARTS, "quality": "vote"}),
    # positives: how they share a question's weight, and who weighs them
    **{
        f"{select}/{judge}": _positives(select, judge)
        for select in ("mean", "wmean", "min", "softmin", "sampling")
        for judge in JUDGED
    },
    "sft-all checks": Arm({"method": "sft-all", "positive_quality": "checks"}),
    "soft": Arm(SOFT),
    "soft checks": Arm(SOFT | {"positive_quality": "checks"}),
    "soft checks + minority": Arm(SOFT | CHECKED | {"negative_source": "minority"}),
    "soft checks + lagged": Arm(SOFT | CHECKED | {"negative_source": "lagged"}),
    "soft checks + lagged mean": Arm(
        SOFT | CHECKED | {"negative_source": "lagged", "negative_select": "mean", "beta": 0.05}
    ),
    "sft-all text": Arm({"method": "sft-all", "positive_quality": "text"}),
    "sft-all discriminator": Arm(  # whatever its AUC; by the default's least one it would not be used here
        {"method": "sft-all", "positive_quality": "discriminator", "discriminator_min_auc": 0.0}
    ),
    **{  # whatever its AUC, too
        f"{select}/discriminator": Arm(
            SOFT | {"positive_select": select, "positive_quality": "discriminator", "discriminator_min_auc": 0.0}
        )
        for select in ("min", "softmin", "sampling")
    },
    **{
        f"softmin {t:g}/{judge}": Arm({"method": "sft-all"}, Rules("softmin", t, positive_judge=judge))
        for t in (0.05, 0.1, 0.4)
        for judge in ("none", "traced", "consensus2")
    },
    # negatives beside the mean of positives
    "minority": _negatives("minority"),
    **{f"minority {judge}": _negatives("minority", negative_judge=judge) for judge in NEGATIVE_JUDGES},
    "minority beta 0.02": _negatives("minority", beta=0.02),
    "lagged": _negatives("lagged"),
    "lagged lag 1": _lagged(negative_lag=1),
    "lagged lag 4": _lagged(negative_lag=4),
    "lagged temperature 0.7": _lagged(negative_temperature=0.7),
    **{f"lagged {judge}": _negatives("lagged", negative_judge=judge) for judge in NEGATIVE_JUDGES},
    "lagged drop": _negatives("lagged", agreeing="drop"),
    "both": _negatives("both"),
    **{f"both {judge}": _negatives("both", negative_judge=judge) for judge in NEGATIVE_JUDGES},
    "both drop": _negatives("both", agreeing="drop"),
    "both max": _negatives("both", negative_select="max"),
    "both max-active": _negatives("both", negative_select="max-active"),
    "minority relative": _negatives("minority", relative=True, delta=0.5),
    "minority beta 0.05": _negatives("minority", beta=0.05),
    "minority different": _negatives("minority", beta=0.02, gate="different"),
    "minority first": _negatives("minority", beta=0.02, gate="first"),
    "minority first 0.1": _negatives("minority", beta=0.1, gate="first"),
    "lagged first vote": _negatives("lagged", beta=0.02, gate="first", negative_judge="vote"),
    "checks + minority first": _negatives(
        "minority", beta=0.02, gate="first", positives="wmean", positive_judge="checks"
    ),
    "checks + both vote": _negatives("both", positives="wmean", positive_judge="checks", negative_judge="vote"),
    "softmin + minority first": _negatives("minority", beta=0.02, gate="first", positives="softmin"),
    "minority late": _negatives("minority", warmup=0.5),
    # more of a teacher than its text (`docs/teacher-signal.md`)
    "dft": Arm({"method": "dft"}),
    **{name: Arm(options, equal_tokens=True, rate=rate) for name, (options, rate) in ON_POLICY.items()},
    **{
        f"sft-all + {name}": Arm(options, equal_tokens=True, warm=0.5, rate=rate)
        for name, (options, rate) in ON_POLICY.items()
    },
    **{
        name: Arm({"method": "mentor-kd", "teacher": MENTOR, "kd_lambda": 1.0, "top_logprobs": k})
        for name, k in {"top-1 KL": 1, "top-4 KL": 4, "top-16 KL": 16, "whole KL": 1000}.items()  # of < 200 tokens
    },
    "gkd forward": Arm({"method": "gkd", "teacher": MENTOR, "gkd_beta": 0.0, "gkd_lambda": 0.0}),
    # the reasoning task
    "sft-all reason": Arm({"method": "sft-all", "reasoning_task": True}),
}
