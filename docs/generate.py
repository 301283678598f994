"""What in docs/ is made from the code and from measurements: python docs/generate.py (a test asserts that it was run).

docs/api.md from the docstrings of the public names, docs/numbers.md and docs/figures/demo.svg from bench/results/*.csv,
the tables of docs/options.md from `TrainConfig`, and the listings of docs/examples in other pages, each after a line
`<!-- examples/NAME.py -->`.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import importlib
import inspect
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
METHODS = {
    "QCRDLoss": ("for_model", "forward"),
    "RationaleCollator": ("__call__",),
    "Discriminator": ("rate", "score"),
}
OUTPUTS = (
    ("qcrd_fast.ops.linear_logprob", "LogProbOutput"),
    ("qcrd_fast.losses", "ContrastiveOutput"),
    ("qcrd_fast.integrations.batch_loss", "RationaleOutput"),
)
ON_OTHER_PAGES = ("active", "study", "study-teacher")  # summed up there
TABLES = {  # file: (title, what it says, key columns, shown columns)
    "embedding": (
        "A training step inside a host trainer",
        "A T5 of T5-small's shape with random weights, forward and backward on one CPU thread in fp32, the same loss "
        "each time: from the model's logits, and through `attach` in one pass and in two. `step_mib`: what the step "
        "allocates at once, its gradients included; `process_peak_mib`: the whole process, with torch and the "
        "weights; `cpu_ms`: processor time, the median of five in turn, with the least and the most. `python -m "
        "bench.embedding --append`",
        ("provider",),
        (
            "provider",
            "tokens",
            "vocabulary",
            "step_mib",
            "process_peak_mib",
            "cpu_ms",
            "cpu_ms_min",
            "cpu_ms_max",
            "commit",
        ),
    ),
    "kl": (
        "The divergence from a teacher",
        "Forward and backward of the mean over all tokens, H = 576 of the student and 896 of the teacher for "
        "`smollm2`. `extra_mib`: the most held at once beyond operands and their two gradients. `qcrd-fast bench kl "
        "--append`",
        ("head", "tokens", "beta", "dtype", "provider", "device", "threads"),
        (
            "head",
            "tokens",
            "beta",
            "dtype",
            "provider",
            "status",
            "ms",
            "ms_min",
            "ms_max",
            "of_eager",
            "extra_mib",
            "extra_of_eager",
            "device",
            "threads",
            "commit",
        ),
    ),
    "loss": (
        "The loss alone",
        "The head and the contrastive loss on the same hidden states; on a CPU, user time. `of_eager`: over eager "
        "`plain` (logits of all tokens with gradients), of the modes `every` over eager `every`; `of_composed`: over "
        "eager code that scores first and trains what was selected; `floor_share`: of the time, what the products "
        "alone take at the rate of the same shape. `qcrd-fast bench loss --append`",
        ("head", "tokens", "logits", "dtype", "provider", "mode", "device", "threads"),
        (
            *("head", "tokens", "dtype", "provider", "mode", "status", "ms", "of_eager", "of_composed"),
            *("floor_share", "peak_mib", "device", "commit"),
        ),
    ),
    "step": (
        "A whole training step",
        "Scoring, selecting, training and the optimizer of one step, `given` with its negatives, else with sampling "
        "them; `hf` is plain Hugging Face code with torch's own linear layers. `of_hf`: its time over this one's. "
        "On a CPU `step_ms` is user time. `qcrd-fast bench step --append`",
        ("shape", "questions", "micro", "positives", "minority", "new", "lengths", "arm", "device", "threads"),
        (
            *("shape", "questions", "positives", "minority", "new", "lengths", "arm", "status", "step_ms"),
            *("sampling_ms", "of_hf", "device", "threads", "commit"),
        ),
    ),
    "executed": (
        "Compiled kernels, executed on a CPU",
        "Every case of the grid against float64: the largest error of log p, of a gradient, and share of tokens that "
        "differ; kernels run in five other orders of programs and warps. Not a measurement of speed: [the "
        "executor](executor.md). `python -m tests.support.ptx.grid --append`",
        ("gpu", "dtype"),
        (
            "gpu",
            "dtype",
            "cases",
            "bad",
            "kernels_in_other_orders",
            "orders",
            "logp_error",
            "grad_error",
            "tokens_that_differ",
            "triton",
            "commit",
        ),
    ),
    "demo": (
        "The demo",
        "Shares of 500 new questions, a row a student. Times are those of both methods; the student is pretrained "
        "once. `python -m qcrd_fast.bench.demo`",
        ("student", "seed"),
        (
            *("student", "seed", "accuracy", "accuracy_reasoned", "sound_reasoning", "wall_s", "cpu_s", "pretrain_s"),
            *("pretrain_cpu_s", "load", "device", "commit"),
        ),
    ),
    "prompts": (
        "Shared prompts",
        "A question's rationales behind one copy of its prompt, against a copy each. `python -m bench.prompts`",
        ("student", "data", "questions", "pass", "mask", "dtype", "device", "threads"),
        ("student", "data", "questions", "pass", "tokens_quotient", "time_quotient", "dtype", "device", "commit"),
    ),
    "runs": (
        "Trained students",
        "Runs of `recipes/`: accuracy on the test questions. With intervals, and how: [recipes](recipes.md).",
        ("recipe", "student", "method", "options", "seed", "data"),
        ("recipe", "method", "options", "seed", "accuracy", "n", "evaluated_on", "gpu_minutes", "device", "commit"),
    ),
    "threads": (
        "Threads of a small student",
        "A training step's wall time [ms] with one CPU thread and with two, medians; `load`: of the machine, which "
        "other processes kept busy. `python -m qcrd_fast.bench.threads --append`",
        ("parameters",),
        ("parameters", "width", "layers", "ms_1", "ms_2", "of_one", "load", "cores", "commit"),
    ),
    "sampler": (
        "Sampling the student",
        "Tokens a second, against transformers' `generate`.",
        ("shape", "prompts", "new", "lengths", "top_k", "dtype", "provider", "device", "threads"),
        ("shape", "prompts", "new", "lengths", "provider", "status", "tokens_per_s", "of_generate", "device", "commit"),
    ),
}


def api_markdown() -> str:
    """docs/api.md: every public name with its signature and docstring."""
    import qcrd_fast

    lines = [
        "# Python API",
        "",
        "These names are stable: `from qcrd_fast import ...`. Everything else may change. Equation numbers are those",
        "of [arXiv 2405.13014](https://arxiv.org/abs/2405.13014); shapes stand in brackets.",
        "",
    ]
    for name in sorted(qcrd_fast.__all__, key=str.lower):
        if name.startswith("__") or name in dict(OUTPUTS).values():
            continue
        item = getattr(qcrd_fast, name)
        lines += entry(f"## `{name}`", name, item.__init__ if inspect.isclass(item) else item, inspect.getdoc(item))
        for method in METHODS.get(name, ()):
            function = getattr(item, method)
            shown = f"{name}.{method}" if method != "forward" and not method.startswith("__") else f"{name}(...)"
            lines += entry(f"### `{shown}`", method.strip("_"), function, inspect.getdoc(function))
    for module, name in OUTPUTS:
        item = getattr(importlib.import_module(module), name)
        lines += [
            f"## `{name}`",
            "",
            *text(inspect.getdoc(item)),
            "",
            f"Fields: {', '.join(f'`{f}`' for f in fields(item))}.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def entry(heading: str, name: str, function: object, doc: str | None) -> list[str]:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    marks: list[str] = []
    for before, p in zip([None, *parameters], parameters, strict=False):
        if p.kind is p.KEYWORD_ONLY and (before is None or before.kind is not p.KEYWORD_ONLY):
            marks.append("*")
        marks.append(str(p.replace(annotation=p.empty)) if p.annotation is p.empty else annotated(p))
    result = signature.return_annotation
    returned = "" if result in (None, "None", inspect.Signature.empty) else f" -> {result}"
    flat = f"{name}({', '.join(marks)}){returned}"
    wrapped = f"{name}(\n" + "".join(f"    {mark},\n" for mark in marks) + f"){returned}"
    return [heading, "", "```text", flat if len(flat) <= 100 else wrapped, "```", "", *text(doc), ""]


def annotated(p: inspect.Parameter) -> str:
    """`name: type = default`; annotations are strings in our modules, and need no quotes here."""
    bare = p.replace(annotation=p.empty, default=p.empty)
    return f"{bare}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}")


def text(doc: str | None) -> list[str]:
    assert doc, "a public name without a docstring"
    return doc.splitlines()


def fields(item: type) -> list[str]:
    return list(getattr(item, "_fields", None) or item.__dataclass_fields__)


def numbers_markdown() -> str:
    """docs/numbers.md: the latest measurement of each case in bench/results."""
    lines = [
        "# Numbers",
        "",
        "Made from `bench/results/*.csv` by `docs/generate.py`: the latest row of each case. A file there has every "
        "run,",
        "with its versions and commit (`-dirty`: with changes not yet committed). What was not measured is not here.",
        "The runs of the studies are summed up on their own pages: [what helps a student](study.md), [what to ask a",
        "teacher about](active.md), [which signal a teacher can give](teacher-signal.md).",
        "",
    ]
    for path in sorted(
        (ROOT / "bench" / "results").glob("*.csv"), key=lambda p: ([*TABLES, p.stem].index(p.stem), p.stem)
    ):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or path.stem in ON_OTHER_PAGES:
            continue
        title, what, keys, columns = TABLES.get(path.stem, (path.stem, "", tuple(rows[0]), tuple(rows[0])))
        latest = {tuple(row.get(k) for k in keys): row for row in rows}
        shown = [c for c in columns if c in rows[0]]
        lines += [f"## {title}", "", *([what, ""] if what else []), table(shown), table(["---"] * len(shown))]
        lines += [table([short(row[c] or "") for c in shown]) for row in latest.values()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def demo_svg(rows: list[dict[str, str]]) -> str:
    """A dot a seed and a line at the mean, for each method of bench/results/demo.csv: its latest run of each seed."""
    rows = [row for row in rows if row["seed"]]
    name = next(column for column in ("student", "method") if column in rows[0])
    value = next(column for column in ("sound_reasoning", "accuracy") if rows[0].get(column))
    latest = {(row[name], row["seed"]): float(row[value]) for row in rows if row[value]}
    methods = list(dict.fromkeys(method for method, _ in sorted(latest)))
    left, right, step = 150, 620, 34
    height = step * len(methods) + 58
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}" viewBox="0 0 680 {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="680" height="{height}" fill="#fff"/>',
    ]
    for tick in range(6):
        x = left + (right - left) * tick / 5
        lines.append(f'<path d="M{x:.1f} 14V{height - 42}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.1f}" y="{height - 26}" text-anchor="middle" fill="#444">{tick / 5:g}</text>')
    for i, method in enumerate(methods):
        y = 14 + step * (i + 0.5)
        values = [each for (own, _), each in sorted(latest.items()) if own == method]
        lines.append(
            f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end" fill="#222">{html.escape(method)}</text>'
        )
        for each in values:
            x = left + (right - left) * each
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#2a6fbb" fill-opacity=".65"/>')
        x = left + (right - left) * sum(values) / len(values)
        lines.append(f'<path d="M{x:.1f} {y - 11:.1f}V{y + 11:.1f}" stroke="#b5412a" stroke-width="2.5"/>')
    label = f"{value.replace('_', ' ')} on new questions; a dot a seed, a line at the mean"
    lines.append(f'<text x="{(left + right) / 2:.1f}" y="{height - 8}" text-anchor="middle" fill="#222">{label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def with_options(page: str) -> str:
    """docs/options.md with the tables of today's options after its first part, which is written by hand."""
    from qcrd_fast.config import options_markdown

    table = options_markdown()
    return page.split(table.partition("\n")[0])[0] + table


def short(cell: str) -> str:
    """Four digits of a fraction; everything else as it is."""
    try:
        return cell if "." not in cell else f"{float(cell):.{max(0, 4 - len(cell.split('.')[0]))}f}"
    except ValueError:
        return cell


def table(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def with_listings(page: str) -> str:
    """The page with each listing as its file is now."""

    def listing(match: re.Match[str]) -> str:
        code = (DOCS / match[1]).read_text(encoding="utf-8").rstrip()
        return f"<!-- {match[1]} -->\n\n```python\n{code}\n```\n"

    return re.sub(r"<!-- (examples/\w+\.py) -->\n\n```python\n.*?```\n", listing, page, flags=re.DOTALL)


def with_active_options(page: str) -> str:
    """docs/active.md with the table of today's options of `active`."""
    from qcrd_fast.active.options import ActiveConfig
    from qcrd_fast.config import TABLE_HEAD, option_row

    rows = "\n".join([*TABLE_HEAD, *map(option_row, dataclasses.fields(ActiveConfig))])
    return re.sub(r"(<!-- options -->\n).*?(?=\n## )", lambda match: f"{match[1]}\n{rows}\n", page, flags=re.DOTALL)


def generated() -> dict[Path, str]:
    """{file: what it should hold}."""
    options = DOCS / "options.md"
    pages = {DOCS / "api.md": api_markdown(), DOCS / "numbers.md": numbers_markdown()}
    pages[options] = with_options(options.read_text(encoding="utf-8"))
    if (path := ROOT / "bench" / "results" / "demo.csv").exists():
        with open(path, newline="", encoding="utf-8") as file:
            pages[DOCS / "figures" / "demo.svg"] = demo_svg(list(csv.DictReader(file)))
    for path in sorted(DOCS.rglob("*.md")):
        if path not in pages:
            page = path.read_text(encoding="utf-8")
            if "<!-- examples/" in page:
                pages[path] = with_listings(page)
            if "<!-- options -->" in page:
                pages[path] = with_active_options(page)
    return pages


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for path, content in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
