"""Compare ways to train a small student on synthetic reasoning tasks.

Arms are paired by seed, a run is one CSV row, and the study is restartable.

python -m qcrd_fast.bench.study --stage screen --tasks mix --families decoder --arms sft-all,dss --seeds 0-7
python -m qcrd_fast.bench.study --table
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from pathlib import Path

import torch

from qcrd_fast.demo.problems import TASKS
from qcrd_fast.demo.students import FAMILIES, cache_folder
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import write_text

from .arms import ARMS
from .runs import STAGES, Case, run_case, seed_ranges
from .tables import COLUMNS, make_tables, updated

RESULTS = Path(__file__).parents[1] / "results" / "study.csv"
log = logging.getLogger("qcrd_fast.bench")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qcrd_fast.bench.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=STAGES, default="screen")
    parser.add_argument("--tasks", default=TASKS[0], help=f"of {','.join(TASKS)}; default: %(default)s")
    parser.add_argument("--families", default=FAMILIES[0], help=f"of {','.join(FAMILIES)}; default: %(default)s")
    parser.add_argument("--arms", default="sft-all,dss", help="names, see --list")
    parser.add_argument("--seeds", default="0-3", help="such as 0-7 or 0,3,5; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=Case._field_defaults["learning_rate"])
    parser.add_argument("--epochs", type=float, default=Case._field_defaults["epochs"])
    parser.add_argument(
        "--questions", type=int, default=Case._field_defaults["questions"], help="to train on, of a seed"
    )
    parser.add_argument("--budget-minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file; rows that it has are not run again")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), help="of pretrained students; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--baselines", default="sft-all,dss", help="arms that --table compares with")
    parser.add_argument(
        "--table", action="store_true", help="print what the CSV holds of the chosen stage, and run nothing"
    )
    parser.add_argument("--fewest-seeds", type=int, default=1, help="of an arm that --table has; default: %(default)s")
    parser.add_argument(
        "--update", type=Path, help="Markdown page whose tables of the stage are to be those of --table"
    )
    parser.add_argument("--list", action="store_true", help="print the arms")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(ARMS))
        return 0
    try:
        if options.table:
            tables = make_tables(options.results, options.stage, options.baselines.split(","), options.fewest_seeds)
            print(tables)
            if options.update:
                page = options.update.read_text(encoding="utf-8")
                write_text(options.update, updated(page, options.stage, tables))
            return 0
        return _run(options)
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("qcrd_fast").setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    logging.getLogger("qcrd_fast.demo").setLevel(logging.INFO)  # a student in the making
    torch.set_num_threads(options.threads)
    tasks, families, arms = (_names(options, name, known) for name, known in _KNOWN.items())
    seeds = seed_ranges(options.seeds)
    done = _done(options.results)
    cases = [
        Case(options.stage, task, family, arm, seed, options.learning_rate, options.epochs, options.questions)
        for seed in seeds  # outside: each is complete before the next
        for task in tasks
        for family in families
        for arm in arms
    ]
    began = time.monotonic()
    for number, case in enumerate(cases, 1):
        if case in done:
            continue
        if options.budget_minutes and time.monotonic() - began > 60 * options.budget_minutes:
            log.info(
                "the budget of %g minutes is spent; %d of %d runs are left",
                options.budget_minutes,
                len(cases) - number + 1,
                len(cases),
            )
            return 75
        row = run_case(case, options.cache)
        append_row(options.results, row)
        found = ", ".join(f"{name} {row[name]:.3f}" for name in ("accuracy", "sound", "faithful"))
        log.info("%d/%d %s: %s, %.1f CPU-s", number, len(cases), " ".join(map(str, case[:5])), found, row["cpu_s"])
    return 0


_KNOWN = {"tasks": TASKS, "families": FAMILIES, "arms": tuple(ARMS)}


def _names(options: argparse.Namespace, option: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in getattr(options, option).split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"--{option}: {name!r} is none of {', '.join(known)}")
    return names


def _done(path: Path) -> set[Case]:
    if not path.exists():
        return set()
    with open(path, newline="", encoding="utf-8") as file:
        return {
            Case(
                row["stage"], row["task"], row["family"], row["arm"], int(row["seed"]),
                float(row["learning_rate"]), float(row["epochs"]), int(row["questions"]),
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def append_row(path: Path, row: dict) -> None:
    from ..record import append, describe_machine

    columns: tuple[str, ...] = COLUMNS
    if path.exists():  # one of before a column came has those of its first line
        with open(path, newline="", encoding="utf-8") as file:
            columns = tuple(next(csv.reader(file), COLUMNS))
    append(path, columns, [describe_machine(torch.device("cpu")) | row], digits=4)


if __name__ == "__main__":
    sys.exit(main())
