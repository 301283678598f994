"""Names are the field's: what an older name meant has one that is found by grep, and no definition brings the old one
back."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

# Nowhere in the repository; spelled with a dot, so that this file is not the one place
GONE = """
    told_.room R.anks K.eeper L.ane lay_.out find_.fault on_.first hidden_.share r.elieved A.sked e.valuating da_.kernel
    kept_.kernel""".replace(".", "").split()

# {files: names that are no function, class, parameter, attribute or import there}
OLD = {
    "*": "Session make_engine find_mode fill_rows survey _admit AHEAD _ahead",
    "qcrd_fast/utils/*": "shown relieved_by",
    "qcrd_fast/distributed/*": "joined ALONE share Engine Replicated Sharded whole full ranks",
    "qcrd_fast/runs/*": "require_whole",
    "qcrd_fast/ops/checks.py": "require_whole",
    "qcrd_fast/train/*": "ALONE joined cut keeper lane said ranks engine full survey",
    "qcrd_fast/train/[ct]*er.py": "found",
    "qcrd_fast/generation/*": "draw body span LANE",
    "qcrd_fast/generation/decoder.py": "read",
    "qcrd_fast/models/*": "visible sees share body",
    "qcrd_fast/discriminator/*": "judge",
    "csrc_triton/*": "bend folds numbers sources",
}


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every definition, parameter, attribute and import."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Attribute():
                yield node.lineno, node.attr
            case ast.ImportFrom():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.Module():
                targets = [t for line in node.body if isinstance(line, ast.Assign) for t in line.targets]
                yield from ((t.lineno, t.id) for t in targets if isinstance(t, ast.Name))


def old_names(path: str, source: str) -> list[str]:
    names = {name for files, some in OLD.items() if fnmatch.fnmatch(path, files) for name in some.split()} | {*GONE}
    return [f"{path}:{line}: {name}" for line, name in named(ast.parse(source)) if name in names]


def sources() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_definition_attribute_or_import_has_an_old_name():
    assert not [line for path in sources() for line in old_names(path, (ROOT / path).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "path, source",
    [
        ("qcrd_fast/train/new.py", "class Session: pass"),
        ("qcrd_fast/train/new.py", "def run(ranks): pass"),
        ("qcrd_fast/select/new.py", f"{GONE[1]} = 1"),
        ("csrc_triton/new.py", "from csrc_triton.product import bend"),
        ("qcrd_fast/models/new.py", "print(packing.visible)"),
    ],
)
def test_an_old_name_is_found(path, source):
    assert old_names(path, source)


def test_coined_words_are_gone():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing to search")
    found = subprocess.run(
        ["git", "grep", "-nw", *(part for word in GONE for part in ("-e", word))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stdout
