"""What is shipped: every import is declared, and the wheel holds what it should."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import PACKAGES, ROOT, modules


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports, anywhere in it; of our own code, the module itself rather than the package around it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {i if i in known else base for i in inner}
    return found


def test_every_import_is_a_declared_dependency() -> None:
    known = modules()
    declared = {"click", "httpx", "jinja2", "numpy", "yaml", "safetensors", "torch", "transformers", "triton"}
    # transformers and jinja2 depend on them
    brought_along = {"huggingface_hub", "markupsafe", "tokenizers", "tqdm"}
    # pyarrow and datasets are imported by name, in data/tables.py
    extras = {"tensorboard", "wandb", "matplotlib", "peft"}
    allowed = {*sys.stdlib_module_names, *PACKAGES, *declared, *brought_along, *extras}
    for name, path in known.items():
        assert {i.split(".")[0] for i in imports(name, path, known)} <= allowed, name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy of what is shipped."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next((source / "dist").glob("*.whl"))).namelist()


def test_wheel_holds_two_names_and_every_module(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"qcrd_fast", "csrc_triton"}
    assert "qcrd_fast/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    for path in modules().values():
        inside = path.relative_to(ROOT).as_posix()
        assert ("qcrd_fast/" + inside if inside.startswith(("bench/", "cli/")) else inside) in wheel


def test_wheel_holds_every_template_and_text(wheel: list[str]) -> None:
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qcrd_fast").rglob("*") if p.is_file()}
    texts = {name for name in files if not name.endswith((".py", ".pyc"))}
    assert {"qcrd_fast/report/page.html.j2", "qcrd_fast/report/page.css"} <= texts <= {*wheel}
