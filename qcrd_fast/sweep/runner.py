"""Run a recipe with several methods and seeds, a process each; skip finished runs, resume started ones.

Adds one CSV row a run. The parent imports no torch, and a failed run does not affect the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qcrd_fast.config import METHODS, DataOptions, TrainConfig, nearest
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.runs.folder import FINAL, NEGATIVES, RESULTS, SNAPSHOTS
from qcrd_fast.sweep.job import ATTEMPTS, JUDGED, WHERE, Job, data_digest
from qcrd_fast.sweep.results_csv import append_row, check_csv, row
from qcrd_fast.train.methods import each_with_its_teacher, method_of
from qcrd_fast.utils.config_files import read_yaml
from qcrd_fast.utils.environment import commit
from qcrd_fast.utils.files import append_lines, remove_tree, write_json, write_text
from qcrd_fast.utils.redact import RedactingFormatter, redact
from qcrd_fast.utils.signals import StopSignals

log = logging.getLogger(__name__)
RUNS_CSV = "bench/results/runs.csv"


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a recipe. Raises `InputError` for a file that is no mapping of train's options."""
    values = read_yaml(path)
    TrainConfig.from_dict(values, str(path))
    return values


def default_csv(config: DataOptions) -> str:
    """bench/results/runs.csv in a checkout, elsewhere OUTPUT_DIR/runs.csv."""
    if Path(RUNS_CSV).parent.is_dir():
        return RUNS_CSV
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / "runs.csv")


def recipe_name(path: str | None, config: DataOptions) -> str:
    """Return the CSV's name of a recipe: its file's, or without one its data's."""
    return Path(path or str(config.data)).stem


def parse_seeds(text: str) -> tuple[int, ...]:
    """`5` is 0, 1, 2, 3, 4; `0,3,7` are these (a single one: `3,`)."""
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "" and len(parts) > 1:
        parts.pop()
    if not parts or not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise InputError(f"--seeds expects how many, such as 5, or which, such as 0,3,7; got {text!r}")
    seeds = tuple(map(int, parts)) if "," in text else tuple(range(int(parts[0])))
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds: {'none' if not seeds else 'one is given twice'} in {text!r}")
    return seeds


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods of a list separated by commas."""
    methods = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for method in methods or ("",):
        if method not in METHODS:
            raise InputError(f"--methods is some of {', '.join(METHODS)}; got {method!r}{nearest(method, METHODS)}")
    return methods


def plan(
    config: TrainConfig, seeds: Sequence[int], methods: Sequence[str], recipe: str, judge: bool = False
) -> list[Job]:
    """Return the runs of every method and seed, in OUTPUT/seed-N, or OUTPUT/METHOD/seed-N with several methods.

    Raises `InputError` for data that is not there, and for a method without the teacher that it needs.
    """
    jobs = []
    for seed in seeds:  # a seed of every method first: an early look compares them
        several = each_with_its_teacher([dataclasses.replace(config, method=method) for method in methods])
        for method, own in zip(methods, several, strict=True):
            folder = Path(str(config.output_dir)) / (method if len(methods) > 1 else "") / f"seed-{seed}"
            one = dataclasses.replace(own, seed=seed, output_dir=str(folder), resume="auto")
            jobs.append(Job(one, recipe, judge))
    check_data(jobs)
    if len(seeds) > 1 and not (config.test_data or config.eval_data):
        log.warning(
            "neither --test-data nor --eval-data is given: each seed holds out other questions of --data, so the seeds "
            "have no mean and the methods no difference with an interval"
        )
    return jobs


def check_data(jobs: Sequence[Job]) -> None:
    """Raises `InputError` for data that is not there."""
    for job in jobs:
        for name in ("data", "eval_data", "test_data"):
            path = getattr(job.config, name)
            if path and not Path(path).exists():
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag}: {path} does not exist; the head of recipe {job.recipe} says how it is made"
                )


def run_jobs(jobs: Sequence[Job], results: str | Path, *, parallel: int = 1, keep: bool = True) -> list[dict[str, Any]]:
    """Run unfinished jobs, `parallel` at a time, and add missing rows to the CSV `results`.

    Without `keep`, a finished run's weights are deleted once its row is written; what it said stays. Returns the rows.
    Raises `RunError` naming the runs that failed when all others are done; `Stopped` after a signal, when the running
    ones have saved.
    """
    csv_path = Path(results)
    check_csv(csv_path)
    todo = [job for job in jobs if job.state != "finished"]
    if len(todo) < len(jobs):
        log.info("%d of %d runs are finished", len(jobs) - len(todo), len(jobs))
    failed: list[str] = []

    @contextlib.contextmanager
    def alone(job: Job) -> Iterator[None]:
        """Keep a failure with a run's files to that run."""
        try:
            yield
        except (OSError, InputError, ValueError, KeyError, TypeError) as error:
            failed.append(job.name)
            log.error("%s failed: %s", job.name, error)

    for job in [job for job in jobs if job not in todo]:
        with alone(job):
            _finish(job, csv_path, keep)
    codes: list[int] = []
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    with StopSignals() as stop:
        asked = False
        try:
            while todo or running:
                while todo and len(running) < parallel and not stop.signum:
                    job = todo.pop(0)
                    with alone(job):
                        if job.state == "finished":  # by another command meanwhile
                            _finish(job, csv_path, keep)
                        else:
                            running[job] = start(job, parallel), time.monotonic()
                if stop.signum and not asked:
                    asked, todo = True, []
                    for process, _ in running.values():
                        process.terminate()
                for job, (process, began) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[job]
                    codes.append(process.returncode)
                    with alone(job):
                        _ended(job, process, began, parallel)
                        if process.returncode == 0:
                            _finish(job, csv_path, keep)
                    if process.returncode and not stop.signum:
                        failed.append(job.name)
                        log.error("%s failed (exit %d): %s", job.name, process.returncode, _last_line(job))
                        if codes == [InputError.exit_code] * 3 and todo:
                            log.error("the first three runs were rejected; the other %d are skipped", len(todo))
                            todo = []
                time.sleep(0.05)
        finally:
            for job, (process, began) in running.items():  # a second signal ends us at once, and them
                process.kill()
                process.wait()
                with contextlib.suppress(OSError):
                    _ended(job, process, began, parallel)
    if stop.signum:
        raise Stopped(stop.signum, "the same command continues from here")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; the same command tries them again"
        )
    return [row(job) for job in jobs]


def start(job: Job, parallel: int) -> subprocess.Popen[bytes]:
    """The run in a process of its own, out of reach of the terminal's signals; it writes to FOLDER.log.

    It ends when its standard input does, so with this process, however that ends: a run that goes on alone would keep
    the folder locked and its time uncounted.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(job.options, yaml.safe_dump(job.config.to_dict(), sort_keys=False, allow_unicode=True))
    command = [sys.executable, "-m", "qcrd_fast.sweep.runner", str(job.options), str(parallel)]
    command += ["--judge"] if job.judge else []
    with open(_log_of(job), "ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True)
    log.info("%s: %s, log in %s", job.name, "resumes" if job.state == "begun" else "starts", _log_of(job))
    return process


def _ended(job: Job, process: subprocess.Popen[bytes], began: float, parallel: int) -> None:
    if process.stdin is not None:
        process.stdin.close()
    _record_attempt(job.folder, began, process.returncode, parallel)


def _record_attempt(folder: Path, began: float, code: int, parallel: int) -> None:
    """Add a run's attempt, which began at `began` of the monotonic clock [s], to its folder, if it has one by now."""
    if folder.is_dir():
        attempt = {"seconds": round(time.monotonic() - began, 1), "exit": code, "parallel": parallel}
        append_lines(folder / ATTEMPTS, [attempt])


def _log_of(job: Job) -> Path:
    return job.folder.with_name(job.folder.name + ".log")


def _last_line(job: Job) -> str:
    with contextlib.suppress(OSError):
        lines = _log_of(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"
    return "no log"


def _finish(job: Job, results: Path, keep: bool) -> None:
    found = row(job)
    if append_row(results, found):
        log.info("%s: accuracy %s after %s s", job.name, found["accuracy"], found["wall_s"])
    if not keep:
        for path in (*job.folder.glob("checkpoint-*"), *(job.folder / name for name in (SNAPSHOTS, NEGATIVES, FINAL))):
            remove_tree(path)


# ---- the child ----


def child(arguments: Sequence[str]) -> int:
    """Train as the YAML file says; with --judge also check the rationales. Records the machine."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("qcrd_fast").setLevel(logging.INFO)
    try:
        config = TrainConfig.from_dict(read_recipe(arguments[0]))
        from qcrd_fast.train.trainer import train

        folder = Path(str(config.output_dir))
        had_finished = (folder / RESULTS).is_file() and (folder / WHERE).is_file()
        train(config)
        if not had_finished:
            write_json(folder / WHERE, environment(config))
        if "--judge" in arguments and method_of(config).teaches_rationales:
            from qcrd_fast.sweep.rationale_checks import judge_run

            write_json(folder / JUDGED, judge_run(folder))
        elif "--judge" in arguments:
            write_json(folder / JUDGED, {})  # it never learnt to explain
    except (InputError, RunError, Stopped) as error:
        print(redact(f"qcrd-fast: {error}"), file=sys.stderr)
        return error.exit_code
    except Exception:
        print(redact(traceback.format_exc().rstrip()), file=sys.stderr)
        return 1
    return 0


def environment(config: TrainConfig) -> dict[str, Any]:
    """The machine, versions and commit of this process."""
    import torch

    from qcrd_fast.doctor import examine
    from qcrd_fast.utils.device import resolve_device
    from qcrd_fast.version import __version__

    device, versions = resolve_device(config.device), examine()["versions"]
    gpu = device.type == "cuda"
    return {
        "gpu": gpu,
        "data": data_digest(config),
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU x{os.cpu_count()}",
        "threads": torch.get_num_threads(),
        "version": __version__,
        **{name: versions[name] for name in ("torch", "triton", "transformers")},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def _end_with_parent(options: Path, began: float, parallel: int) -> None:
    """Wait for the end of standard input, which the command that started this run holds; then record the attempt and
    end at once, as by a kill."""
    os.read(0, 1)  # without sys.stdin's lock, which a thread must not hold when the process ends
    try:
        log.error("the command that started this run is gone; the same command continues from the latest checkpoint")
        _record_attempt(options.with_suffix(""), began, 1, parallel)
    finally:
        os._exit(1)


if __name__ == "__main__":
    watched = (Path(sys.argv[1]), time.monotonic(), int(sys.argv[2]))
    threading.Thread(target=_end_with_parent, args=watched, daemon=True).start()
    sys.exit(child(sys.argv[1:]))
