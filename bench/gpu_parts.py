"""The parts of `bench.gpu`: command, time limit, requirements, and how to read the results."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .counters import find_ncu
from .sass import missing_tools

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = __package__ or "bench"  # qcrd_fast.bench where it is installed
CLI = f"import sys; from {PACKAGE.removesuffix('bench')}cli.main import entry; sys.exit(entry())"
SKIPPED = "skipped"
HEADS, SHAPES = ("smollm2-135m", "t5-base", "llama-3-8b", "gemma-3-270m"), ("smollm2-135m", "t5-base")
SANITIZER_ERRORS = 86
REHEARSED_DESIGN = "128 x 128, cp.async"
Verdict = tuple[str, str]  # (ok | wrong | failed, what to say in a line)


class Setting(NamedTuple):
    """The options of the command."""

    output: Path
    data: Path | None
    student: str | None
    seeds: int
    append: bool
    rehearse: bool


class Part(NamedTuple):
    """One part of the run.

    read: (exit code, content of NAME.json, log) to a result. lacks: why it cannot run here. least_s: not started with
    less time left.
    """

    name: str
    limit_s: float
    command: list[str]
    read: Callable[[int, dict[str, Any], str], Verdict]
    lacks: str | None = None
    least_s: float = 5.0
    env: dict[str, str] = {}  # noqa: RUF012  # never written to


def find_parts(setting: Setting) -> list[Part]:
    """Return the parts, the most important first."""
    small = setting.rehearse
    heads, shapes = (("rehearsal",), ("tiny-t5",)) if small else (HEADS, SHAPES)
    parts = [_kernels(setting), _tests(setting), _sanitizer(setting), _model(setting), _counters(setting)]
    for head in heads:
        flags = ["--heads", head, "--device", "cpu" if small else "cuda", "--repeats", "1" if small else "20"]
        flags += (
            ["--tokens", "112", "--logits", "peaked", "--providers", "eager,qcrd-torch,qcrd-triton"] if small else []
        )
        parts.append(_bench(setting, "loss", head, 90, flags, read_loss))
    for head in heads:
        flags = ["--short", "--heads", head, "--repeats", "1" if small else "10"]
        flags += ["--tokens", "64", "--dtype", "fp32"] if small else []
        command = _module("tuning", setting, f"tuning-{head}", *flags, *(["--append"] if setting.append else []))
        parts.append(Part(f"tuning-{head}", 90, command, read_tuning, env=_env(setting)))
    for shape in shapes:
        flags = (
            ["--prompts", "4", "--new-tokens", "4", "--lengths", "fixed", "--providers", "qcrd,generate"]
            if small
            else []
        )
        flags += ["--repeats", "1"] if small else ["--repeats", "3", "--prompts", "64", "--lengths", "ragged"]
        parts.append(_bench(setting, "sampler", shape, 120, ["--shapes", shape, *flags], read_rates))
    for shape in shapes:
        flags = ["--questions", "1", "--repeats", "1", "--providers", "given"] if small else ["--repeats", "3"]
        parts.append(_bench(setting, "step", shape, 150, ["--shapes", shape, *flags], read_rates))
    return [*parts, _training(setting)]


# ---- what each runs
# ----------------------------------------------------------------------------------------------------


def _env(setting: Setting) -> dict[str, str]:
    """Return the environment; a rehearsal interprets the kernels even where there is a GPU."""
    return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if setting.rehearse else {}


def _module(module: str, setting: Setting, name: str, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"{PACKAGE}.{module}",
        *flags,
        "--json",
        str(setting.output / f"{name}.json"),
    ]


def _bench(
    setting: Setting, verb: str, what: str, limit_s: float, flags: list[str], read: Callable[..., Verdict]
) -> Part:
    """Return the part that runs `qcrd-fast bench VERB`."""
    name = f"{verb}-{what}"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        CLI,
        "bench",
        verb,
        *flags,
        "--json",
        str(setting.output / f"{name}.json"),
    ]
    env = _env(setting)
    if verb != "loss":
        env.pop("TRITON_INTERPRET", None)  # there is nothing to see of the kernels, and it is slow
    return Part(name, limit_s, command + ["--append"] * setting.append, read, env=env)


def _kernels(setting: Setting) -> Part:
    flags = ["--small", "--dtypes", "fp32"] if setting.rehearse else []  # the interpreter turns bf16 into fp32
    command = _module("kernel_checks", setting, "kernels", *flags)
    return Part("kernels", 120, command, read_kernels, env=_env(setting))


def _tests(setting: Setting) -> Part:
    tests = ROOT / "tests"
    lacks = None if find_spec("pytest") and tests.is_dir() else "needs pytest and a checkout"
    files = [str(path) for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        *files,
    ]
    return Part("tests", 180, command, read_tests, lacks, env=_env(setting))


def _sanitizer(setting: Setting) -> Part:
    """Return the part that checks out-of-bounds reads and writes of every kernel.

    It bypasses torch's caching allocator, which would hide them.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    lacks = "a rehearsal" if setting.rehearse else None if tool else "compute-sanitizer is not installed"
    own = _module("kernel_checks", setting, "sanitizer", "--small", "--dtypes", "bf16")
    command = [tool or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", str(SANITIZER_ERRORS), *own]
    return Part("sanitizer", 120, command, read_sanitizer, lacks, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _model(setting: Setting) -> Part:
    """Return the part that predicts rates, to compare with those measured later.

    It compiles for an H100 whatever GPU is here, and runs nothing on it; a rehearsal has one design of it.
    """
    missing = missing_tools()
    lacks = f"this triton brings no {' and no '.join(missing)}" if missing else None
    return Part(
        "model",
        60,
        _module("model", setting, "model", *(["--only", REHEARSED_DESIGN] if setting.rehearse else [])),
        read_model,
        lacks,
        env=_env(setting) | {"TRITON_INTERPRET": "0"},
    )


def _counters(setting: Setting) -> Part:
    lacks = "a rehearsal" if setting.rehearse else None if find_ncu() else "ncu (Nsight Compute) is not installed"
    return Part("counters", 90, _module("counters", setting, "counters"), read_counters, lacks)


def _training(setting: Setting) -> Part:
    lacks = None
    if not setting.rehearse:
        lacks = "--data and --student are not given" if not (setting.data and setting.student) else None
        lacks = lacks or (None if (ROOT / "recipes").is_dir() else "needs a checkout, for its recipes")
    flags = [
        "--output-dir",
        str(setting.output / "training"),
        "--seeds",
        "1" if setting.rehearse else str(setting.seeds),
    ]
    flags += ["--rehearse"] if setting.rehearse else ["--data", str(setting.data), "--student", str(setting.student)]
    env = _env(setting)
    env.pop("TRITON_INTERPRET", None)
    command = _module("gpu_training", setting, "training", *flags)
    return Part(
        "training", float("inf"), command, read_training, lacks, least_s=30 if not setting.rehearse else 5, env=env
    )


# ---- how it is read
# ----------------------------------------------------------------------------------------------------


def _worst(statuses: list[str]) -> str:
    """Return the worst status: wrong, failed or ok."""
    kinds = {status.partition(":")[0] for status in statuses}
    return "wrong" if "wrong" in kinds else "failed" if "failed" in kinds else "ok"


def read_kernels(code: int, results: dict[str, Any], log: str) -> Verdict:
    rows = results.get("rows", [])
    bad = [f"{row['check']} {row['dtype']} {row['status']}" for row in rows if row["status"] != "ok"]
    if bad or code:  # a kernel that does not run is wrong
        return "wrong", "; ".join(bad) or last_line(log)
    worst = max(rows, key=lambda row: row["budget_used"])
    return (
        "ok",
        f"{len(rows)} checks; the worst uses {worst['budget_used']:.0%} of its budget: {worst['check']} "
        f"{worst['dtype']}",
    )


def read_tests(code: int, results: dict[str, Any], log: str) -> Verdict:
    return {0: "ok", 1: "wrong"}.get(code, "failed"), last_line(log)


def read_sanitizer(code: int, results: dict[str, Any], log: str) -> Verdict:
    said = next((line for line in reversed(log.splitlines()) if "ERROR SUMMARY" in line), last_line(log))
    return "wrong" if code == SANITIZER_ERRORS else "failed" if code else "ok", said.strip("= ")


def read_model(code: int, results: dict[str, Any], log: str) -> Verdict:
    rows = results.get("rows", [])
    return (
        ("failed", last_line(log))
        if code or not rows
        else ("ok", f"{len(rows)} designs; beside measurements in results.md")
    )


def read_counters(code: int, results: dict[str, Any], log: str) -> Verdict:
    rows = results.get("rows", [])
    said = [f"{row['tile']} {row['tflops']:.0f} TFLOP/s" if "tflops" in row else row["status"] for row in rows]
    return "failed" if code else "ok", "; ".join(said) or last_line(log)


def read_loss(code: int, results: dict[str, Any], log: str) -> Verdict:
    """Compare our times with the best peer. A wrong peer is listed, and does not fail the part."""
    if code or not results:
        return "failed", last_line(log)
    ours = [row for case in results["cases"] for row in case["rows"] if row["provider"] == "qcrd-triton"]
    said = []
    for case in results["cases"]:
        timed = [row for row in case["rows"] if "ms" in row and row["mode"] != "score" and row["status"] == "ok"]
        mine = min((row for row in timed if row["provider"] == "qcrd-triton"), key=lambda row: row["ms"], default=None)
        other = min((row for row in timed if row["provider"] != "qcrd-triton"), key=lambda row: row["ms"], default=None)
        if mine and other:
            said.append(
                f"{case['case']['logits']}: {mine['mode']} {mine['ms']:.4g} ms, {mine['floor_share']:.0%} of the "
                f"floor's rate; best other {other['provider']} {other['mode']} {other['ms']:.4g} ms"
            )
    return _worst([row["status"] for row in ours]) if ours else "failed", "; ".join(said) or "qcrd-triton did not run"


def read_tuning(code: int, results: dict[str, Any], log: str) -> Verdict:
    rows = results.get("rows", [])
    said = []
    for name in dict.fromkeys(row["pass"] for row in rows):
        timed = [row for row in rows if row["pass"] == name and "ms" in row and row["way"] != "products"]
        if timed:
            best = min(timed, key=lambda row: row["ms"])
            said.append(f"{name}: {best['way']} {1 / best['of_products']:.0%} of the products' rate")
    wrong = [row["way"] for row in rows if row["status"] == "wrong"]
    if wrong:
        return "wrong", f"{', '.join(wrong)}; " + "; ".join(said)
    return "failed" if code else "ok", "; ".join(said) or last_line(log)


def read_rates(code: int, results: dict[str, Any], log: str) -> Verdict:
    """Read tokens per second of the sampler, or milliseconds of a step."""
    if code or not results:
        return "failed", last_line(log)
    said = []
    for row in results["rows"]:
        who = row.get("provider") or row.get("arm")
        if row.get("tokens_per_s"):
            said.append(f"{who} {row['tokens_per_s']:.0f} tokens/s")
        elif row.get("step_ms"):
            said.append(f"{who} {row['step_ms']:.4g} ms")
    return _worst([row["status"] for row in results["rows"]]), "; ".join(said)


def read_training(code: int, results: dict[str, Any], log: str) -> Verdict:
    rows = results.get("rows", [])
    said = "; ".join(f"{row['method']} seed {row['seed']} {float(row['accuracy']):.3f}" for row in rows)
    return "failed" if code else "ok", said or last_line(log)


def last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
