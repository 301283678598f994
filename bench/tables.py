"""Fill the paper's tables and ours from bench/results/runs.csv; missing runs are made first.

python -m qcrd_fast.bench.tables --dry-run                              every run, and whether its row is there
python -m qcrd_fast.bench.tables --parallel 4 --output docs/results.md  goes on where it was stopped
python -m qcrd_fast.bench.tables --print-only                           only what is there
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.config import PARTS, TrainConfig
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.sweep.intervals import pair, single
from qcrd_fast.sweep.job import Job, key
from qcrd_fast.sweep.results_csv import JUDGEMENTS, MEANS, answers_of, check_csv, read_csv, shares, signed
from qcrd_fast.sweep.runner import RUNS_CSV, check_data, parse_seeds, read_recipe, run_jobs
from qcrd_fast.train.methods import method_of
from qcrd_fast.utils.files import write_text

log = logging.getLogger(__name__)
RATES = (2e-5, 5e-5, 1e-4, 2e-4)
Rows = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A line of a table: options beside the recipe's, and the paper's value for T5-base on SVAMP [%]."""

    label: str
    options: Mapping[str, Any]
    paper: float | None = None

    def flags(self) -> str:
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.options.items())


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    against: labels that every line is compared with. tune: judged on validation, without a test set. columns: means of
    these columns instead of accuracies.
    """

    name: str
    title: str
    recipes: tuple[str, ...]
    variants: tuple[Variant, ...]
    against: tuple[str, ...] = ()
    tune: bool = False
    columns: tuple[str, ...] = ()


def qcrd(label: str, paper: float | None = None, **options: Any) -> Variant:
    """Options of the paper's method, including the parts that the defaults leave out."""
    return Variant(label, {"method": "qcrd", **PARTS, **options}, paper)


PAPER = {"finetune": 63.0, "single-task": 59.0, "dss": 65.5, "mi": 67.5, "qcrd": 69.0}
NAMES = ("finetune", "single-task", "dss", "sft-all", "mi", "redi", "qcrd", "default")
METHOD = {name: Variant(name, {"method": name}, PAPER.get(name)) for name in NAMES}
METHOD |= {"qcrd": qcrd("qcrd", PAPER["qcrd"]), "default": Variant("default", {"method": TrainConfig.method})}
MAIN, SMALL = ("pooled-smollm2", "svamp-equation-smollm2"), ("svamp-mentors-smollm2",)
TABLES = (
    Table("tuning", "Learning rates, on validation alone: the best of each method is used in all other tables",
    MAIN + SMALL,
          tuple(Variant(f"{m}, {rate:g}", {**METHOD[m].options,
          "learning_rate": rate}) for m in METHOD for rate in RATES),
          tune=True),
    Table("methods", "Methods", MAIN, tuple(METHOD.values()), ("dss", "sft-all")),
    Table("ablation", "Ablation", SMALL, (
        METHOD["dss"],
        qcrd("+ all positives", 67.0, negative_source="none", quality="none"),
        qcrd("+ negatives", 68.5, quality="none"),
        Variant("+ discriminator as printed (qcrd)", {"method": "qcrd", "paper": True}, 69.0),
        qcrd("qcrd, discriminator out of fold (ours)"),
        qcrd("qcrd without student negatives", negative_source="minority"),
        METHOD["sft-all"],
    ), ("dss",)),
    Table("schemes", "Schemes", SMALL, (
        qcrd("minmax", 69.0), qcrd("maxmin", 67.0, scheme="maxmin"), qcrd("sampling", 66.5, scheme="sampling"),
        qcrd("mean", 65.0, scheme="mean"), qcrd("wmean", 66.0, scheme="wmean"),
        qcrd("min, max-active (ours)", negative_select="max-active"),
    ), ("minmax",)),
    Table("negatives", "Negative source and lag", SMALL, (
        qcrd("lagged, j = 3", 68.0, negative_lag=3), qcrd("lagged, j = 5", 69.0),
        qcrd("lagged, j = 10", 68.5, negative_lag=10),
        qcrd("fixed: the initial student (the paper's: a DSS student)", 66.5, negative_source="fixed"),
        qcrd("minority alone", 64.5, negative_source="minority"), qcrd("none", negative_source="none"),
    ), ("lagged, j = 5",)),
    Table("top-k", "Truncation of the sampled negatives", SMALL, (
        qcrd("top-k 10", negative_top_k=10), qcrd("top-k 50"), qcrd("top-k 200", negative_top_k=200),
        qcrd("whole softmax", negative_top_k=0),
    ), ("top-k 50",)),
    Table("size", "Training-set size, as many steps", SMALL, tuple(
        Variant(f"{m}, {share:.0%}", {**METHOD[m].options, **({"train_fraction": share} if share < 1 else {})})
        for share in (0.25, 0.5, 0.75, 1.0) for m in ("dss", "sft-all", "qcrd", "default")
    )),
    Table("rationales", "Rationales on the test questions: shares", MAIN,
          tuple(METHOD[m] for m in ("dss", "sft-all", "mi", "redi", "qcrd", "default")), columns=JUDGEMENTS),
    Table("logs", "What the logs say of the negatives: means over the steps", MAIN + SMALL, (qcrd("qcrd"),),
    columns=MEANS),
)  # fmt: skip


def arm(options: Mapping[str, Any]) -> str:
    """Return the name of `NAMES` under which a line's learning rate is tuned."""
    return (
        "default"
        if options["method"] == "qcrd" and not {"scheme", "paper"} & options.keys()
        else str(options["method"])
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    folder: Path  # of the recipes
    output_dir: Path
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]
    student: str | None = None
    # what tuning chose
    rates: dict[tuple[str, int], dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def job(self, table: Table, recipe: str, variant: Variant, seed: int, rows: Rows) -> Job:
        """Return the run of a line at the tuned learning rate."""
        values = read_recipe(self.folder / f"{recipe}.yaml") | ({"student": self.student} if self.student else {})
        if table.tune:
            values["test_data"] = None
        else:
            values |= self.tuned(recipe, rows).get(arm(variant.options), {})
        config = TrainConfig.from_dict(values | dict(variant.options) | {"seed": seed, "resume": "auto"}, recipe)
        same = repr([config.test_data, {k: v for k, v in key(Job(config, recipe)).items() if k != "seed"}])
        name = f"{config.method}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
        config = dataclasses.replace(config, output_dir=str(self.output_dir / recipe / name / f"seed-{seed}"))
        return Job(config, recipe, judge=not table.tune and any(variant.options == m.options for m in METHOD.values()))

    def jobs(self, table: Table, recipe: str, variant: Variant, rows: Rows) -> list[Job]:
        return [self.job(table, recipe, variant, s, rows) for s in (self.tune_seeds if table.tune else self.seeds)]

    def tuned(self, recipe: str, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return {name of `NAMES`: learning rate with the best mean validation accuracy, ties to the smaller}.

        Empty unless all runs of all names are complete, so that no method is tuned longer than another.
        """
        known = (recipe, len(rows))
        if known not in self.rates:
            best: dict[str, tuple[float, float]] = {}
            for variant in TABLES[0].variants:
                found = found_rows(TABLES[0], recipe, variant, self, rows)
                if len(found) < len(self.tune_seeds):
                    best = {}
                    break
                tried, value = arm(variant.options), mean(found, "accuracy_validation")
                if tried not in best or value > best[tried][0]:
                    best[tried] = value, variant.options["learning_rate"]
            self.rates[known] = {method: {"learning_rate": rate} for method, (_, rate) in best.items()}
        return self.rates[known]


def find(job: Job, rows: Rows) -> dict[str, str] | None:
    """Return the latest row of a run; without the data here, of any data with this recipe's name."""
    wanted = {name: str(value) for name, value in key(job).items() if name != "data" or value}
    wanted["evaluated_on"] = "test" if job.config.test_data else "validation"
    return next((row for row in reversed(rows) if all(row[name] == value for name, value in wanted.items())), None)


def select(names: str, recipes: str, lines: str) -> list[Table]:
    """Return the requested tables, recipes and lines. Raises `InputError` for unknown names."""
    known = {table.name: table for table in TABLES}
    for name in (wanted := [n for n in names.split(",") if n]):
        if name not in known:
            raise InputError(f"--tables is some of {', '.join(known)}; got {name!r}")
    found = [known[n] for n in wanted] or list(TABLES)
    if chosen := tuple(r for r in recipes.split(",") if r):
        found = [dataclasses.replace(t, recipes=chosen) for t in found]
    if kept := {label for label in lines.split(",") if label}:
        if unknown := kept - {v.label for t in found for v in t.variants}:
            raise InputError(f"--lines: no line {sorted(unknown)[0]!r} in these tables")
        found = [dataclasses.replace(t, variants=tuple(v for v in t.variants if v.label in kept),
                                     against=tuple(a for a in t.against if a in kept)) for t in found]  # fmt: skip
    return found


# ---- Markdown ----


def render(tables: Sequence[Table], settings: Settings, rows: Rows) -> str:
    """Format all tables, each with its command; a missing row is "not run"."""
    parts = [
        "# Results\n\nMade by `python -m qcrd_fast.bench.tables` from `bench/results/runs.csv`. Accuracies in percent "
        "with 95% intervals over questions and seeds, differences in points, paired; *detectable*: the smallest true "
        "difference that such an experiment finds with 80% power. How: [recipes](recipes.md)."
    ]
    for table in tables:
        for recipe in table.recipes:
            lines = as_means if table.columns else as_accuracies
            head = f"## {table.title}: {recipe}"
            parts.append(
                "\n".join([head, "", command(table, recipe, settings), "", *lines(table, recipe, settings, rows)])
            )
    return "\n\n".join(parts) + "\n"


def command(table: Table, recipe: str, settings: Settings) -> str:
    own = recipe in next(t for t in TABLES if t.name == table.name).recipes
    seeds = len(settings.tune_seeds if table.tune else settings.seeds)
    text = f"`python -m qcrd_fast.bench.tables --tables {table.name}{'' if own else f' --recipes {recipe}'}`"
    return (
        text
        if table.tune
        else f"{text}; a line: `qcrd-fast train --config recipes/{recipe}.yaml --seeds {seeds}` OPTIONS"
    )


def as_accuracies(table: Table, recipe: str, settings: Settings, rows: Rows) -> list[str]:
    found = {v.label: found_rows(table, recipe, v, settings, rows) for v in table.variants}
    answers = {label: answers_of(of) for label, of in found.items()}
    paper = recipe.startswith("svamp") and any(v.paper for v in table.variants)
    head = ["", "options", "validation" if table.tune else "accuracy", "seeds"]
    head += [f"against {label}, detectable" for label in table.against]
    head += ["GPU minutes a run", "device", *(["paper, T5-base"] if paper else [])]
    lines = [line(head), line(["---"] * len(head))]
    rates = {} if table.tune else settings.tuned(recipe, rows)
    for variant in table.variants:
        mine = found[variant.label]
        if not mine:
            cells = ["not run"] * (len(head) - 2 - paper)
        elif table.tune:
            cells = [f"{100 * mean(mine, 'accuracy_validation'):.1f}"]
        else:
            told = single(answers[variant.label])
            cells = [shares(told) if told else "questions differ"]
        if mine:
            cells.append(f"{len(mine)}")
            for label in table.against:
                against = pair(answers[variant.label], answers[label]) if label != variant.label else None
                cells.append(f"{signed(against)}, {100 * against.detectable:.1f}" if against else "")
            minutes = [float(r["gpu_minutes"]) for r in mine if r["gpu_minutes"]]
            cells += [
                f"{statistics.mean(minutes):.1f}" if minutes else "",
                ", ".join(sorted({r["device"] for r in mine})),
            ]
        cells += [f"{variant.paper:.1f}" if variant.paper else ""] if paper else []
        shown = dataclasses.replace(variant, options=dict(variant.options) | rates.get(variant.options["method"], {}))
        lines.append(line([variant.label, f"`{shown.flags()}`", *cells]))
    return lines


def as_means(table: Table, recipe: str, settings: Settings, rows: Rows) -> list[str]:
    lines = [
        line(["", *(c.replace("_", " ") for c in table.columns), "seeds"]),
        line(["---"] * (len(table.columns) + 2)),
    ]
    for variant in table.variants:
        mine = found_rows(table, recipe, variant, settings, rows)
        without = "none" if mine else "not run"  # nothing of the kind in any run
        cells = [f"{mean(mine, c):.3f}" if any(r[c] for r in mine) else without for c in table.columns]
        lines.append(line([variant.label, *cells, str(len(mine))]))
    return lines


def found_rows(table: Table, recipe: str, variant: Variant, settings: Settings, rows: Rows) -> Rows:
    return [row for job in settings.jobs(table, recipe, variant, rows) if (row := find(job, rows))]


def mean(rows: Rows, column: str) -> float:
    return statistics.mean(float(r[column]) for r in rows if r[column])


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---- the command ----


def plan(tables: Sequence[Table], settings: Settings, rows: Rows) -> dict[Path, tuple[Job, bool]]:
    """Return {folder: (run, whether its row is missing)}; a run of several tables is listed once."""
    found: dict[Path, tuple[Job, bool]] = {}
    for table in tables:
        for recipe in table.recipes:
            for seed_jobs in zip(*(settings.jobs(table, recipe, v, rows) for v in table.variants), strict=True):
                for job in seed_jobs:  # every line's first seed, then the second
                    row = find(job, rows)
                    lacks = not row or (job.judge and method_of(job.config).teaches_rationales
                                        and not row["ends_in_gold"])  # fmt: skip
                    found[job.folder] = job, lacks
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="", help=f"some of {', '.join(t.name for t in TABLES)}; default: all")
    parser.add_argument("--recipes", default="", help="run the tables on these recipes instead of their own, by name")
    parser.add_argument("--lines", default="", help="only these lines of the tables, by label, such as dss,qcrd")
    parser.add_argument("--recipe-folder", type=Path, default=Path("recipes"))
    parser.add_argument("--seeds", default="5", help="how many, or which; default: 5")
    parser.add_argument("--tune-seeds", default="2", help="of the table tuning; default: 2")
    parser.add_argument("--student", help="folder of the student, in place of the recipes'")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tables"), help="default: runs/tables")
    parser.add_argument("--results", type=Path, default=Path(RUNS_CSV), help=f"default: {RUNS_CSV}")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on one GPU")
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished runs")
    parser.add_argument("--output", type=Path, help="Markdown file to write; default: standard output")
    parser.add_argument("--print-only", action="store_true", help="run nothing")
    parser.add_argument("--dry-run", action="store_true", help="list every run and stop")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("qcrd_fast").setLevel(logging.INFO)
    try:
        fill(args)
    except (InputError, RunError, Stopped) as error:
        print(f"tables: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def fill(args: argparse.Namespace) -> None:
    """Run and print what `main` was asked for. Raises what `run_jobs` raises, after printing."""
    if args.parallel < 1:
        raise InputError(f"--parallel must be at least 1, got {args.parallel}")
    seeds, tune_seeds = parse_seeds(args.seeds), parse_seeds(args.tune_seeds)
    settings = Settings(args.recipe_folder, args.output_dir, seeds, tune_seeds, args.student)
    tables = select(args.tables, args.recipes, args.lines)
    if not args.dry_run and not args.print_only:
        check_csv(args.results)
    if args.dry_run:
        jobs = plan(tables, settings, read_csv(args.results))
        for folder, (job, lacks) in jobs.items():
            print(f"{'to run' if lacks else 'done  '}  {folder}  {job.recipe} {key(job)['options']}")
        print(f"{sum(lacks for _, lacks in jobs.values())} of {len(jobs)} runs are to be made", file=sys.stderr)
        return
    try:
        for some in ([t for t in tables if t.tune], [t for t in tables if not t.tune]):  # the rest depends on tuning
            missing = [job for job, lacks in plan(some, settings, read_csv(args.results)).values() if lacks]
            if missing and not args.print_only:
                check_data(missing)
                run_jobs(missing, args.results, parallel=args.parallel, keep=args.keep)
    finally:
        text = render(tables, settings, read_csv(args.results))
        if args.output:
            write_text(args.output, text)
        else:
            print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
