"""`metrics.jsonl`: one object a logged step, read a step late so that logging never stalls a GPU."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qcrd_fast.distributed.comm import SINGLE, Comm
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.runs.folder import METRICS, WANDB_ID
from qcrd_fast.train.judging import WEIGHT_KINDS
from qcrd_fast.train.run_text import duration, progress_line
from qcrd_fast.utils.files import append_lines, read_records, sync, write_lines, write_text

log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0
WIDE = 160  # columns of a terminal that has room for all of `progress_line` beside the bar


def mean(counts: Counter[str], total: str, number: str) -> float | None:
    return counts[total] / counts[number] if counts[number] else None


def active_fraction(counts: Counter[str], source: str) -> float | None:
    """Return the fraction of a source's negatives whose hinge is active."""
    return mean(counts, f"{source}_active", source)


def step_record(
    counts: Counter[str],
    *,
    step: int,
    iteration: int,
    loss_d: float | None,
    lagged_agrees: float | None,
    lr: float,
    elapsed_s: float,
    sample_wait_s: float,
    sampled_tokens_per_s: float | None,
    overlap_fraction: float | None,
    auc: tuple[float | None, float | None],
) -> dict[str, Any]:
    """Return a step's record for `MetricsLog.put`, which adds the losses and the norm of the gradient.

    counts: of the objective, over all micro-batches and ranks. auc: of the discriminator, and its lower bound.
    """
    return {
        "step": step,
        "iteration": iteration,
        "loss": None,
        "loss_pred": None,
        "loss_cl": None,
        "loss_d": loss_d,
        "quality_positive": mean(counts, "quality_positive", "num_positive"),
        "quality_negative": mean(counts, "quality_negative", "num_negative"),
        **{f"weight_{kind}": mean(counts, f"weight_{kind}", f"weighed_{kind}") for kind in WEIGHT_KINDS},
        "lagged_agrees": lagged_agrees,
        "active_hinge_lagged": active_fraction(counts, "lagged"),
        "active_hinge_minority": active_fraction(counts, "minority"),
        "masked_minority_share": mean(counts, "masked_minorities", "minority_questions"),
        "lr": lr,
        "grad_norm": None,
        "tokens_per_s": counts["tokens"] / elapsed_s,
        "step_ms": 1e3 * elapsed_s,
        "sample_wait_ms": 1e3 * sample_wait_s,
        "sampled_tokens_per_s": sampled_tokens_per_s,
        "sample_hidden_share": overlap_fraction,
        "discriminator_auc": auc[0],
        "discriminator_auc_low": auc[1],
    }


class Progress:
    """Progress of a run: a bar on a terminal.

    Elsewhere, and in `run.log`: a line at the first step, every ten seconds and at the last step.
    """

    def __init__(self, total: int, done: int, shown: bool = True):
        self.total, self._first, self._began = total, done, time.monotonic()
        self._said, self._said_step = -math.inf, 0
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=not on_terminal)

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """After `step`; `record` is the latest that was read."""
        drawn, now = self._bar.update(1), time.monotonic()
        if record is None:
            return
        if drawn:
            self._bar.set_postfix_str(progress_line(record, short=self._bar.ncols < WIDE), refresh=False)
        if now - self._said >= LINE_EVERY_S:
            left = (now - self._began) / (step - self._first) * (self.total - step)
            self._say(record, f", {duration(left)} left", now)

    def stage(self, name: str) -> None:
        """Show the name of work between two steps, such as a validation."""
        self._bar.set_description_str(name)

    def last(self, record: Mapping[str, Any] | None) -> None:
        """After the last step."""
        if record is not None and record["step"] > self._said_step:
            self._say(record, "", time.monotonic())

    def close(self) -> None:
        """Close the bar and leave it visible, so that later output starts on a new line."""
        self._bar.close()

    def _say(self, record: Mapping[str, Any], left: str, now: float) -> None:
        self._said, self._said_step = now, record["step"]
        share = record["step"] / self.total
        # a terminal has the bar instead
        log.info("step %d/%d (%.0f%%)%s: %s", record["step"], self.total, 100 * share, left, progress_line(record),
                 extra={"progress": True})  # fmt: skip


class MetricsLog:
    """Appends to `metrics.jsonl` and, if asked, to TensorBoard or Weights & Biases.

    Raises `RunError` within one step of a loss or gradient that is not finite, or of a gradient that is zero though the
    loss is not, naming the step and its questions;
    `InputError` when the package of `report_to` is not installed.
    """

    def __init__(self, run: Path, report_to: str = "none", comm: Comm = SINGLE, name: str | None = None):
        self.path, self.comm = run / METRICS, comm
        self._pending: tuple[dict[str, Any], list[str], Tensor, float, list[str], bool] | None = None
        self._tracker = _tracker(run, report_to, name) if comm.first else None
        self.last: dict[str, Any] | None = None  # the latest record that was read, for a person who watches

    def truncate_after(self, step: int) -> None:
        """Delete records after `step`, for a resume."""
        self.comm.on_rank0(lambda: write_lines(self.path, [record for record in self.read() if record["step"] <= step]))

    def read(self) -> list[dict[str, Any]]:
        """Return the readable records; skip damaged lines with a warning."""
        records: list[dict[str, Any]] = []
        skipped: list[int] = []
        for record in read_records(self.path, "skip", skipped=skipped):
            try:
                records.append(record | {"step": int(record["step"])})
            except (ValueError, TypeError, KeyError, OverflowError):
                skipped.append(0)
        if skipped:
            log.warning("%s: passed over %d damaged lines", self.path, len(skipped))
        return records

    def put(
        self, record: dict[str, Any], values: dict[str, Tensor], loss_extra: float, ids: list[str], logged: bool
    ) -> None:
        """Queue a step's record; `values` are 0-d device tensors, `loss_extra` is added to their loss."""
        self.flush()
        stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        self._pending = (record, list(values), stacked, loss_extra, ids, logged)

    def flush(self) -> None:
        if self._pending is None:
            return
        (record, names, stacked, loss_extra, ids, logged), self._pending = self._pending, None
        values = dict(zip(names, stacked.tolist(), strict=True))
        bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise RunError(f"step {record['step']}: {', '.join(bad)}; questions {', '.join(ids)}")
        if values["loss"] and values.get("grad_norm") == 0:  # such as a student whose weights are all zero
            raise RunError(
                f"step {record['step']}: loss {values['loss']:g} without any gradient; questions {', '.join(ids)}"
            )
        record |= values
        record["loss"] += loss_extra
        self.last = record
        if logged:
            self.write(record)

    def sync(self) -> None:
        """Flush pending records to disk, before a checkpoint that relies on them."""
        self.flush()
        if self.path.exists():
            sync(self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; of several ranks the first does, alone."""
        if not self.comm.first:
            return
        append_lines(self.path, [record])
        if self._tracker:
            self._tracker.add({k: v for k, v in record.items() if isinstance(v, int | float)}, record["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the tracker's run, so that a later run of this process has its own."""
        if self._tracker:
            self._tracker.end(int(error is not None))


class _TensorBoard:
    def __init__(self, make: Callable[..., Any], folder: Path):
        self._make, self._folder = make, folder
        self._board: Any = None

    def add(self, values: dict[str, Any], step: int) -> None:
        # what an earlier start logged from the first step on is not shown
        self._board = self._board or self._make(str(self._folder), purge_step=step)
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def end(self, code: int) -> None:
        if self._board:
            self._board.close()


class _WandB:
    """A resume goes on in the run that the folder names; W&B drops the steps that it repeats."""

    def __init__(self, wandb: Any, run: Path, name: str | None):
        self._wandb, path = wandb, run / WANDB_ID
        known = path.read_text(errors="replace").strip() if path.is_file() else ""
        begun = wandb.init(
            project="qcrd-fast", dir=str(run), name=name, id=known or None, resume="allow" if known else None
        )
        write_text(path, f"{begun.id}\n")

    def add(self, values: dict[str, Any], step: int) -> None:
        self._wandb.log(values, step=step)

    def end(self, code: int) -> None:
        self._wandb.finish(exit_code=code)


def _tracker(run: Path, report_to: str, name: str | None) -> _TensorBoard | _WandB | None:
    if report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--report-to tensorboard: install qcrd-fast[tensorboard]") from error
        return _TensorBoard(SummaryWriter, run / "tensorboard" / (name or ""))
    if report_to == "wandb":
        try:
            import wandb
        except ImportError as error:
            raise InputError("--report-to wandb: install qcrd-fast[wandb]") from error
        return _WandB(wandb, run, name)
    return None
