"""`demo`: built-in word problems, a teacher that reaches many right answers by a wrong way, a student that is
pretrained here.

Everything after the data and the student is what real data goes through.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.demo import problems
from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import RunFolder
from qcrd_fast.train.methods import each_with_its_teacher
from qcrd_fast.utils.files import remove_tree, write_lines

if TYPE_CHECKING:
    from qcrd_fast.demo.students import Recipe

log = logging.getLogger(__name__)
TASK, LARGEST = "mix", 20  # of `problems`; largest result
QUESTIONS, TEST_QUESTIONS = 660, 500
COMPARE = "compare"  # folder of the run to compare with
DEFAULTS: dict[str, Any] = dict(
    task="number",
    reasoning_task=True,
    learning_rate=1.5e-3,
    num_train_epochs=7,
    warmup_ratio=0.05,
    negative_lag=2,
    negative_top_k=5,  # of a vocabulary of less than two hundred; 50 would be no truncation
    max_new_tokens=36,
    max_source_length=96,
    max_target_length=48,
    max_answer_tokens=4,
    sample_batch_size=512,
    eval_batch_size=512,
    eval_steps=131,
    save_steps=131,  # four in 525 steps
    discriminator_pretrain_steps=60,
    discriminator_update_batches=8,
    discriminator_learning_rate=5e-4,
    validation_fraction=0.1,
    logging_steps=5,
)


def demo_paths(folder: Path) -> dict[str, str]:
    """Where the demo's data and student stand, as train's options."""
    names = {"data": "train.jsonl", "test_data": "test.jsonl", "student": "student"}
    return {option: str(folder / name) for option, name in names.items()}


def write_demo(folder: Path, seed: int, recipe: Recipe | None = None) -> dict[str, str]:
    """Write test.jsonl, the same for all seeds, train.jsonl (sampled rows), and last the pretrained student.

    Return their paths as train's options. `recipe`: of the student; by default the demo's.
    """
    paths = demo_paths(folder)
    folder.mkdir(exist_ok=True)
    rng, taken = random.Random(seed), set[str]()
    test = problems.draw_problems(TASK, TEST_QUESTIONS, random.Random("test"), taken, LARGEST)
    write_lines(Path(paths["test_data"]), problems.write_rows("test", test, None))
    train = problems.draw_problems(TASK, QUESTIONS, rng, taken, LARGEST)
    write_lines(Path(paths["data"]), problems.write_rows("train", train, rng))
    write_student(Path(paths["student"]), recipe)
    return paths


def write_student(folder: Path, recipe: Recipe | None = None) -> None:
    """Put the demo's student into `folder`: the one that this user's cache keeps, made now where it is not there
    yet."""
    from qcrd_fast.demo.students import DEMO, cache_folder, pretrain, student_folder

    unfinished = folder.with_name(f".{folder.name}.tmp")
    remove_tree(unfinished)
    try:
        shutil.copytree(student_folder(recipe or DEMO, cache_folder()), unfinished)
    except OSError as error:
        log.info(
            "the demo's student cannot be kept in %s (%s); it is made for this run alone",
            cache_folder(),
            error.strerror,
        )
        remove_tree(unfinished)
        pretrain(recipe or DEMO, unfinished)
    os.replace(unfinished, folder)


def run_demo(
    overrides: dict[str, Any], output_dir: str, *, compare: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Make the demo's data and student in `output_dir/demo`, train, and return what `train` returns and `comparison`,
    the rows of `comparison.compare_runs`; they stand in `output_dir/report.html` too, where matplotlib is installed.

    `overrides` are train's options; data, student and test set are the demo's own. `compare`: a method that is trained
    with the same options in `output_dir/compare/METHOD`. Raises `InputError` for options at fault, and what `train`
    raises.
    """
    paths = demo_paths(Path(output_dir) / "demo")
    for name in paths:
        if overrides.get(name) is not None:
            raise InputError(f"demo brings its own --{name.replace('_', '-')}; to use yours, run: qcrd-fast train")
    configs = [_config(overrides | paths | {"output_dir": output_dir})]
    if compare:
        if compare == configs[0].method:
            raise InputError(f"--compare {compare}: that is the method of the demo itself; name another")
        if configs[0].resume not in (None, "auto"):
            raise InputError(
                f"--resume {configs[0].resume} is for one run; with --compare, --resume auto continues both"
            )
        other = str(Path(output_dir) / COMPARE / compare)
        configs.append(_config(overrides | paths | {"output_dir": other, "method": compare}))
    configs = each_with_its_teacher(configs)
    if dry_run:
        plan = {"questions": QUESTIONS, "test": TEST_QUESTIONS, "config": configs[0].resolved().to_dict()}
        return plan | ({"compare": configs[1].resolved().to_dict()} if compare else {})
    for config in configs:
        with RunFolder(config) as run:
            if not Path(paths["student"]).is_dir():
                write_demo(Path(output_dir) / "demo", configs[0].seed)
            from qcrd_fast.train.trainer import (
                train,  # after the lock: a folder in use is refused before torch is loaded
            )

            train(config, run)
    from qcrd_fast.demo.comparison import compare_runs

    return compare_runs([str(config.output_dir) for config in configs])


def _config(options: dict[str, Any]) -> TrainConfig:
    """The demo's defaults under `options`, less those that only another option would bring, such as a
    discriminator's."""
    config = TrainConfig.from_dict(DEFAULTS | options)
    idle = {flag[2:].replace("-", "_") for flag in config.unused()}
    return TrainConfig.from_dict({name: value for name, value in DEFAULTS.items() if name not in idle} | options)
